"""``taopd score --compare`` and the FP8 head in training, used as a user would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_taopd import cli
from megatron_taopd.errors import ConfigError
from megatron_taopd.ops import HeadShard
from megatron_taopd.ops.fp8 import Fp8Head
from megatron_taopd.training.head_comparison import agreement, comparison_table
from tests.oracle.cases import make_pair, make_rollouts
from tests.oracle.reference import read_jsonl

TP2 = ("--tensor-model-parallel-size=2", "--sequence-parallel")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("commands")
    make_pair(root, "qwen3")
    make_rollouts(root / "rollouts.jsonl", seed=4)
    return root


def words(root: Path, name: str, *flags: str) -> list[str]:
    return [
        name,
        f"--student={root / 'student'}",
        f"--teacher={root / 'teacher'}",
        f"--rollout-data={root / 'rollouts.jsonl'}",
        *flags,
    ]


def score(root: Path, out: str, *flags: str) -> None:
    cli.run(words(root, "score", f"--output={root / out}.jsonl", "--keep-ratio=0.3", *flags))


@pytest.mark.parametrize("ranks, layout", [(1, ()), (2, TP2)], ids=["one", "tp2"])
def test_compare_tells_what_separate_runs_tell(pool, root: Path, ranks: int, layout: tuple[str, ...]) -> None:
    ways = {
        "model": (),
        "fp8-1": ("--score-head-precision=fp8", "--score-head-stages=1"),
        "fp8-2": ("--score-head-precision=fp8",),
    }
    for name, flags in ways.items():
        pool(ranks).run(score, root, f"{name}-{ranks}", *flags, *layout)
    pool(ranks).run(score, root, f"compare-{ranks}", "--compare=bf16,fp8", *layout)
    tables = {name: read_jsonl(root / f"{name}-{ranks}.jsonl") for name in ways}
    assert read_jsonl(root / f"compare-{ranks}.jsonl") == tables["model"], "the table is by the models' own heads"
    result = json.loads((root / f"compare-{ranks}.compare.json").read_text())
    kept = {name: {i for i, row in enumerate(table) if row["keep"]} for name, table in tables.items()}
    assert (result["positions"], result["kept"]) == (len(tables["model"]), len(kept["model"]))
    assert list(result["heads"]) == ["bf16", "fp8-1", "fp8-2"]
    for name in ("fp8-1", "fp8-2"):
        figures, both = result["heads"][name], len(kept["model"] & kept[name])
        assert figures["kept"] == len(kept[name])
        assert figures["reference_also_kept"] == pytest.approx(both / len(kept["model"]))
        assert figures["also_in_reference"] == pytest.approx(both / len(kept[name]))
        for column in ("D", "C", "H"):
            apart = [abs(a[column] - b[column]) for a, b in zip(tables["model"], tables[name], strict=True)]
            assert figures[f"max_abs_{column}"] == pytest.approx(max(apart), abs=1e-7)
            assert figures[f"mean_abs_{column}"] == pytest.approx(sum(apart) / len(apart), abs=1e-7)
    one, two = (result["heads"][name] for name in ("fp8-1", "fp8-2"))
    assert two["max_abs_D"] < 1e-4 < one["max_abs_D"]
    assert two["mean_abs_C"] < one["mean_abs_C"]
    assert 0 < result["heads"]["bf16"]["mean_abs_D"] < one["mean_abs_D"]


def test_agreement_by_hand() -> None:
    def columns(keep: list[int], d: list[float]) -> dict:
        other = dict.fromkeys(("C", "H", "kl_forward", "student_logprob", "teacher_logprob"), torch.zeros(4).numpy())
        return {"keep": torch.tensor(keep).numpy(), "D": torch.tensor(d).numpy(), **other}

    figures = agreement(columns([1, 1, 1, 0], [0, 1, 2, 3]), columns([0, 1, 0, 1], [0, 1.5, 2, 2]))
    assert figures["kept"] == 2
    assert figures["reference_also_kept"] == pytest.approx(1 / 3)
    assert figures["also_in_reference"] == pytest.approx(1 / 2)
    assert (figures["mean_abs_D"], figures["max_abs_D"]) == (pytest.approx(0.375), 1.0)
    text = comparison_table({"heads": {"bf16": figures}})
    assert "33.33 %" in text and "50.00 %" in text and "3.8e-01, 1.0e+00" in text


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--compare=fp4",), ("'fp4'", "bf16, fp8")),
        (("--compare=fp8,fp8",), ("fp8", "twice")),
        (("--compare=fp8", "--score-head-precision=fp8"), ("--score-head-precision", "no effect with --compare")),
        (("--compare-output=x.json",), ("--compare-output x.json", "no effect without --compare")),
    ],
)
def test_compare_refuses(root: Path, capsys, flags: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    try:
        score(root, "refused", *flags)
    except ConfigError as error:
        message = str(error)
    except SystemExit:
        message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    else:
        pytest.fail("nothing was refused")
    for word in wanted:
        assert word in message
    assert not (root / "refused.jsonl").exists()


def train(root: Path, out: str, *flags: str) -> list[dict]:
    """Runs in every rank; also counts how often a head was put into FP8."""
    made = []
    real = Fp8Head.of.__func__

    def counting(cls: type[Fp8Head], head: HeadShard) -> Fp8Head:
        made.append(head.weight.shape[1])
        return real(cls, head)

    Fp8Head.of = classmethod(counting)
    try:
        cli.run(
            words(
                root,
                "train",
                "--rollout-engine=file",
                "--train-iters=3",
                "--lr=1e-2",
                f"--log-dir={root / out}",
                "--keep-ratio=0.5",
                *flags,
            )
        )
    finally:
        Fp8Head.of = classmethod(real)
    return made


def metrics(root: Path, out: str) -> list[dict]:
    return read_jsonl(root / out / "metrics.jsonl")


@pytest.mark.parametrize("scope", ["global", "carried"])
def test_training_makes_the_teachers_head_once_and_the_students_each_step(pool, root: Path, scope: str) -> None:
    flags = (f"--selection-scope={scope}", "--loss=reverse_kl")
    assert pool(1).run(train, root, f"{scope}-model", *flags) == [[]]
    (made,) = pool(1).run(train, root, f"{scope}-fp8", "--score-head-precision=fp8", *flags)
    widths = [json.loads((root / name / "config.json").read_text())["hidden_size"] for name in ("student", "teacher")]
    assert sorted(made) == sorted([widths[0]] * 3 + [widths[1]])
    for a, b in zip(metrics(root, f"{scope}-model"), metrics(root, f"{scope}-fp8"), strict=True):
        for name in (
            "loss",
            "mean_D",
            "mean_C",
            "grad_norm",
        ):  # a stale head of the student would be far off at this lr
            assert b[name] == pytest.approx(a[name], rel=5e-3), name


def test_the_loss_is_exact(pool, root: Path) -> None:
    """A selector that reads no statistics keeps the same rows: loss and gradient are the same numbers."""
    flags = ("--selector=random", "--loss=reverse_kl")
    pool(1).run(train, root, "random-model", *flags)
    pool(1).run(train, root, "random-fp8", "--score-head-precision=fp8", "--score-head-stages=1", *flags)
    for a, b in zip(metrics(root, "random-model"), metrics(root, "random-fp8"), strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])
        assert a["mean_D"] != b["mean_D"], "the statistics are FP8's"


def refused(root: Path, *flags: str) -> str:
    try:
        train(root, "refused", *flags)
    except ConfigError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def test_the_loss_takes_no_log_probabilities_of_an_fp8_head(pool, root: Path) -> None:
    without = root / "without.jsonl"
    lines = [json.loads(line) for line in (root / "rollouts.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("response_logprobs", None)
    without.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ("--score-head-precision=fp8", "--loss=sampled_reverse_kl", f"--rollout-data={without}")
    (message,) = pool(1).run(refused, root, *flags)
    assert "--loss sampled_reverse_kl" in message and "response_logprobs" in message
