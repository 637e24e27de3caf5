"""4 steps, stop, resume for 4 more = 8 steps straight, to the bit; and a checkpoint loads at another layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_taopd import cli
from tests.oracle.cases import make_pair, make_rollouts

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "dp2-distopt": (2, ("--use-distributed-optimizer",)),
    "tp2pp2sp-bf16": (
        4,
        (
            "--tensor-model-parallel-size=2",
            "--pipeline-model-parallel-size=2",
            "--sequence-parallel",
            "--bf16",
            "--use-distributed-optimizer",
        ),
    ),
}
TIMES = ("time_rollout", "time_score", "time_train", "time_step", "tokens_per_second")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    make_pair(root, "qwen3", tied_student=True)
    make_rollouts(root / "rollouts.jsonl", count=20, seed=7)
    prompts = [{"id": f"p{i}", "prompt_tokens": [3 + i, 40 + i, 100 + i]} for i in range(10)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return root


def train(root: Path, out: str, iters: int, flags: tuple[str, ...], *extra: str) -> None:
    source = ["--rollout-engine=file", f"--rollout-data={root / 'rollouts.jsonl'}"]
    if "--rollout-engine=megatron" in extra:
        source = [f"--prompt-data={root / 'prompts.jsonl'}", "--max-response-length=6"]
    cli.run(
        [
            "train",
            f"--student={root / 'student'}",
            f"--teacher={root / 'teacher'}",
            *source,
            "--global-batch-size=4",
            "--micro-batch-size=2",
            f"--train-iters={iters}",
            "--selector=random",
            "--keep-ratio=0.2",
            "--lr=1e-3",
            "--lr-decay-style=cosine",
            "--lr-decay-iters=8",
            "--lr-warmup-iters=2",
            f"--log-dir={root / out}",
            f"--export-hf={root / out / 'hf'}",
            *flags,
            *extra,
        ]
    )


def straight_and_resumed(root: Path, name: str, *extra: str) -> None:
    """Runs in every rank."""
    flags = LAYOUTS[name][1]
    train(root, f"{name}-straight", 8, flags, *extra)
    save = f"--save={root / name / 'checkpoints'}"
    train(root, f"{name}-resumed", 4, flags, save, *extra)
    train(root, f"{name}-resumed", 8, flags, save, f"--load={root / name / 'checkpoints'}", *extra)


def metrics_of(root: Path, name: str) -> list[dict]:
    rows = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@pytest.mark.parametrize(
    "name, engine",
    [("one", "megatron"), ("dp2-distopt", "file"), ("tp2pp2sp-bf16", "file"), ("dp2-distopt", "megatron")],
)
def test_resume_is_exact(pool, root: Path, name: str, engine: str, tmp_path: Path) -> None:
    if (root / f"{name}-straight").exists():
        root = tmp_path
        make_pair(root, "qwen3", tied_student=True)
        (root / "prompts.jsonl").write_text('{"id": "a", "prompt_tokens": [5, 6]}\n{"id": "b", "prompt_tokens": [9]}\n')
    extra = ("--rollout-engine=megatron",) if engine == "megatron" else ()
    pool(LAYOUTS[name][0]).run(straight_and_resumed, root, name, *extra)
    straight, resumed = metrics_of(root, f"{name}-straight"), metrics_of(root, f"{name}-resumed")
    assert [row["iteration"] for row in straight] == list(range(1, 9))
    assert resumed == straight
    wanted = load_file(root / f"{name}-straight" / "hf" / "model.safetensors")
    got = load_file(root / f"{name}-resumed" / "hf" / "model.safetensors")
    for tensor_name, tensor in wanted.items():
        assert torch.equal(got[tensor_name], tensor), tensor_name


def resume_elsewhere(root: Path, source: str, out: str, flags: tuple[str, ...]) -> None:
    train(root, out, 8, flags, f"--load={root / source / 'checkpoints'}")


def test_checkpoint_resumes_at_another_layout(pool, root: Path) -> None:
    """Saved at DP2 with the distributed optimizer, resumed at TP2·PP2: the same continuation up to rounding."""
    flags = (
        "--tensor-model-parallel-size=2",
        "--pipeline-model-parallel-size=2",
        "--use-distributed-optimizer",
    )
    if not (root / "dp2-distopt").exists():
        pool(2).run(straight_and_resumed, root, "dp2-distopt")
    (root / "first" / "checkpoints").mkdir(parents=True)
    pool(2).run(train, root, "first", 4, LAYOUTS["dp2-distopt"][1], f"--save={root / 'first' / 'checkpoints'}")
    pool(4).run(resume_elsewhere, root, "first", "elsewhere", flags)
    straight, moved = metrics_of(root, "dp2-distopt-straight"), metrics_of(root, "elsewhere")
    assert [row["iteration"] for row in moved] == [5, 6, 7, 8]
    for a, b in zip(straight[4:], moved, strict=True):
        assert b["num_kept_tokens"] == a["num_kept_tokens"]
        assert b["loss"] == pytest.approx(a["loss"], rel=5e-3)
        assert b["learning_rate"] == a["learning_rate"]
