"""A teacher at a layout of its own: score tables against brute force, a training step against autograd, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from megatron_taopd import cli
from tests.oracle import reference
from tests.oracle.cases import STUDENT_VOCAB, make_pair, make_rollouts
from tests.oracle.test_score import COLUMNS
from tests.transformers_experts import per_expert

LR = 0.5
KEEP_RATIO = 0.25
TEMPERATURE = 1.3

# name -> (family, flags); all on four ranks
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "TP4 for TP2PP2SP": (
        "qwen3",
        (
            *("--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2", "--sequence-parallel"),
            *("--teacher-tensor-model-parallel-size=4", "--teacher-pipeline-model-parallel-size=1"),
        ),
    ),
    "PP2last1 for TP2": (
        "qwen3",
        (
            "--tensor-model-parallel-size=2",
            *("--teacher-tensor-model-parallel-size=1", "--teacher-pipeline-model-parallel-size=2"),
            "--teacher-decoder-last-pipeline-num-layers=1",
        ),
    ),
    "DP4 for TP4": ("llama", ("--tensor-model-parallel-size=4", "--teacher-tensor-model-parallel-size=1")),
    "PP2 for CP2TP2SP": (
        "llama",
        (
            *("--context-parallel-size=2", "--tensor-model-parallel-size=2", "--sequence-parallel"),
            *("--teacher-tensor-model-parallel-size=2", "--teacher-pipeline-model-parallel-size=2"),
        ),
    ),
    "EP4 for dense TP2": (
        "qwen3-from_moe",
        (
            "--tensor-model-parallel-size=2",
            *("--teacher-tensor-model-parallel-size=1", "--teacher-expert-model-parallel-size=4"),
        ),
    ),
    "EP4 for TP2EP2SP": (
        "qwen3_moe",
        (
            *("--tensor-model-parallel-size=2", "--expert-model-parallel-size=2", "--sequence-parallel"),
            *("--teacher-tensor-model-parallel-size=1", "--teacher-expert-model-parallel-size=4"),
        ),
    ),
}
TIED_TEACHER = {"qwen3": True, "llama": False, "qwen3_moe": False, "qwen3-from_moe": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teacher_layout")
    for family, tied in TIED_TEACHER.items():
        (root / family).mkdir()
        make_pair(root / family, family, tied_student=not tied, tied_teacher=tied)
    make_rollouts(root / "seven.jsonl", count=7)  # replicas have unequal shares
    make_rollouts(root / "eight.jsonl", count=8, seed=3)
    return root


def run_case(root: Path, case: str) -> None:
    """Runs in every rank."""
    family, flags = CASES[case]
    both = [
        f"--student={root / family / 'student'}",
        f"--teacher={root / family / 'teacher'}",
        f"--keep-ratio={KEEP_RATIO}",
        "--micro-batch-size=2",
        f"--temperature={TEMPERATURE}",
        "--logits-chunk-bytes=65536",
        *flags,
    ]
    packed = ["--packed-sequences"] if "CP2" in case else []  # and side by side in training
    cli.run(["score", f"--rollout-data={root / 'seven.jsonl'}", f"--output={root / case}.parquet", *both, *packed])
    cli.run(
        [
            *("train", "--rollout-engine=file", f"--rollout-data={root / 'eight.jsonl'}"),
            *("--train-iters=1", "--loss=reverse_kl", "--optimizer=sgd", f"--lr={LR}", "--weight-decay=0"),
            *("--clip-grad=0", f"--log-dir={root / case}", f"--export-hf={root / case / 'hf'}", *both),
        ]
    )


def compare_table(path: Path, wanted: list[dict]) -> None:
    """A score table with float64 statistics."""
    table = pq.read_table(path).to_pydict()
    assert table["id"] == [f"r{row['sample']}" for row in wanted]
    assert table["token_id"] == [row["token_id"] for row in wanted]
    for column in COLUMNS:
        values = np.array([row[column] for row in wanted])
        np.testing.assert_allclose(np.array(table[column]), values, rtol=1e-3, atol=1e-6, err_msg=column)
    assert table["keep"] == reference.teachability_keep(wanted, KEEP_RATIO)


def compare_step(out: Path, student: Path, grads: dict[str, torch.Tensor], loss: float) -> None:
    """An exported student after one SGD step with the gradient it should have taken."""
    start, after = load_file(student / "model.safetensors"), load_file(out / "hf" / "model.safetensors")
    wrong = total = 0.0
    for name, weights in start.items():
        wanted = -LR * grads.get(name, torch.zeros_like(weights, dtype=torch.float64))
        difference = (after[name].double() - weights.double() - wanted).norm().item()
        wrong, total = wrong + difference**2, total + wanted.norm().item() ** 2
        assert difference <= 2e-2 * wanted.norm().item() + 1e-6 * weights.norm().item(), name
    assert (wrong / total) ** 0.5 <= 1e-2
    metrics = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["loss"] == pytest.approx(loss, rel=5e-3)


def gradient(
    student: torch.nn.Module, teacher_logits: list[torch.Tensor], rollouts: list[dict], keep: torch.Tensor
) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient by HF parameter name and loss of the mean reverse KL over the kept positions."""
    logits = [reference.response_logits(student, rollout, STUDENT_VOCAB) / TEMPERATURE for rollout in rollouts]
    tokens = torch.tensor([token for rollout in rollouts for token in rollout["response_tokens"]])
    rows = reference.loss_rows(
        "reverse_kl", torch.cat(logits)[keep], torch.cat(teacher_logits)[keep], tokens[keep], k=16
    )
    student.zero_grad()
    rows.mean().backward()
    grads = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return per_expert(grads), rows.mean().item()


@pytest.fixture(scope="module")
def models(root: Path) -> dict[str, tuple[torch.nn.Module, torch.nn.Module]]:
    return {
        family: (reference.load_float64(root / family / "student"), reference.load_float64(root / family / "teacher"))
        for family in TIED_TEACHER
    }


@pytest.mark.parametrize("case", CASES)
def test_scores_and_gradient(pool, root: Path, models, case: str) -> None:
    pool(4).run(run_case, root, case)
    family = CASES[case][0]
    student, teacher = models[family]

    def table(rollouts: list[dict]) -> list[dict]:
        return reference.statistics_table(student, teacher, rollouts, vocab_size=STUDENT_VOCAB, temperature=TEMPERATURE)

    compare_table(root / f"{case}.parquet", table(reference.read_jsonl(root / "seven.jsonl")))
    rollouts = reference.read_jsonl(root / "eight.jsonl")
    keep = torch.tensor(reference.teachability_keep(table(rollouts), KEEP_RATIO))
    with torch.no_grad():
        logits = [reference.response_logits(teacher, rollout, STUDENT_VOCAB) / TEMPERATURE for rollout in rollouts]
    compare_step(root / case, root / family / "student", *gradient(student, logits, rollouts, keep))
