"""Two teachers, each with responses of its own: scores, selection over all and the gradient, against float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_taopd import cli
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.oracle import reference
from tests.oracle.cases import STUDENT_VOCAB, make_pair, make_rollouts
from tests.oracle.test_teacher_layout import KEEP_RATIO, LR, TEMPERATURE, compare_step, compare_table, gradient

TP2PP2SP = ("--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2", "--sequence-parallel")
# name -> flags; all on four ranks
CASES: dict[str, tuple[str, ...]] = {
    "TP2PP2SP packed": (*TP2PP2SP, "--packed-sequences"),
    # The first replica has no response for the second teacher.
    "PP2 for TP2": (
        "--tensor-model-parallel-size=2",
        *("--teacher-tensor-model-parallel-size=1", "--teacher-pipeline-model-parallel-size=2"),
    ),
}
TEACHER_OF = ["math", "math", "math", "math", "code", "math", "code", "code"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("several_teachers")
    make_pair(root, "qwen3", tied_student=True)
    save_tiny_hf_model(
        root / "other", "llama", vocab_size=511, hidden_size=32, num_layers=2, num_kv_heads=4, tied=True, seed=9
    )
    rows = make_rollouts(root / "rollouts.jsonl", count=8, seed=5)
    lines = [json.dumps({**row, "teacher": name}) + "\n" for row, name in zip(rows, TEACHER_OF, strict=True)]
    (root / "rollouts.jsonl").write_text("".join(lines))
    return root


def run_case(root: Path, case: str) -> None:
    """Runs in every rank."""
    both = [
        *(f"--student={root / 'student'}", f"--rollout-data={root / 'rollouts.jsonl'}"),
        *(f"--teacher=math={root / 'teacher'}", f"--teacher=code={root / 'other'}"),
        *(f"--keep-ratio={KEEP_RATIO}", "--micro-batch-size=2", f"--temperature={TEMPERATURE}"),
        *CASES[case],
    ]
    cli.run(["score", f"--output={root / case}.parquet", *both])
    cli.run(
        [
            *("train", "--rollout-engine=file", "--train-iters=1", "--loss=reverse_kl"),
            *("--optimizer=sgd", f"--lr={LR}", "--weight-decay=0", "--clip-grad=0"),
            *(f"--log-dir={root / case}", f"--export-hf={root / case / 'hf'}", *both),
        ]
    )


@pytest.fixture(scope="module")
def expected(root: Path) -> tuple[list[dict], dict[str, torch.Tensor], float]:
    """Statistics of every position, gradient and loss of the kept ones."""
    student = reference.load_float64(root / "student")
    teachers = {"math": reference.load_float64(root / "teacher"), "code": reference.load_float64(root / "other")}
    rollouts = reference.read_jsonl(root / "rollouts.jsonl")
    table = []
    for sample, rollout in enumerate(rollouts):
        rows = reference.statistics_table(
            student, teachers[rollout["teacher"]], [rollout], vocab_size=STUDENT_VOCAB, temperature=TEMPERATURE
        )
        table += [{**row, "sample": sample} for row in rows]
    keep = torch.tensor(reference.teachability_keep(table, KEEP_RATIO))
    with torch.no_grad():
        logits = [reference.response_logits(teachers[r["teacher"]], r, STUDENT_VOCAB) / TEMPERATURE for r in rollouts]
    return table, *gradient(student, logits, rollouts, keep)


@pytest.mark.parametrize("case", CASES)
def test_scores_gradient_and_metrics(pool, root: Path, expected, case: str) -> None:
    table, grads, loss = expected
    pool(4).run(run_case, root, case)
    compare_table(root / f"{case}.parquet", table)
    compare_step(root / case, root / "student", grads, loss)
    metrics = json.loads((root / case / "metrics.jsonl").read_text())
    keep = reference.teachability_keep(table, KEEP_RATIO)
    for name in ("math", "code"):
        own = [(row, kept) for row, kept in zip(table, keep, strict=True) if TEACHER_OF[row["sample"]] == name]
        assert metrics[f"teacher/{name}/num_kept_tokens"] == sum(kept for _, kept in own)
        assert metrics[f"teacher/{name}/keep_ratio"] == pytest.approx(sum(kept for _, kept in own) / len(own))
        wanted = sum(row["kl_forward"] for row, _ in own) / len(own)
        assert metrics[f"teacher/{name}/kl_forward"] == pytest.approx(wanted, rel=1e-3)


def generate_and_train(root: Path) -> None:
    cli.run(
        [
            *("train", f"--student={root / 'student'}", f"--prompt-data={root / 'prompts.jsonl'}"),
            *(f"--teacher=math={root / 'teacher'}", f"--teacher=code={root / 'other'}", "--max-response-length=6"),
            *("--train-iters=1", "--global-batch-size=6", "--micro-batch-size=2", f"--log-dir={root / 'generated'}"),
        ]
    )


def test_prompts_name_the_teacher_of_their_responses(pool, root: Path) -> None:
    names = ["code", "math", "code"]
    lines = [json.dumps({"prompt_tokens": [5 + i, 9], "teacher": name}) for i, name in enumerate(names)]
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    pool(1).run(generate_and_train, root)
    metrics = json.loads((root / "generated" / "metrics.jsonl").read_text())
    kept = [metrics[f"teacher/{name}/num_kept_tokens"] for name in ("math", "code")]
    assert sum(kept) == metrics["num_kept_tokens"] > 0
    assert metrics["teacher/math/kl_forward"] > 0 < metrics["teacher/code/kl_forward"]
