"""``--teacher-dtype``: a bf16 teacher beside an fp32 student, and the other way round; no copy of it is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_taopd import cli
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.run_config import ModelPairConfig, OptimizationConfig, PrecisionConfig
from tests.oracle import reference
from tests.oracle.cases import STUDENT_VOCAB, make_pair, make_rollouts

TP2PP2SP = ("--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2", "--sequence-parallel")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dtype")
    make_pair(root, "qwen3", tied_student=True)
    make_rollouts(root / "rollouts.jsonl", seed=3)
    return root


def score(root: Path, out: str, *flags: str) -> None:
    cli.run(
        [
            "score",
            f"--student={root / 'student'}",
            f"--teacher={root / 'teacher'}",
            f"--rollout-data={root / 'rollouts.jsonl'}",
            f"--output={root / out}",
            *flags,
        ]
    )


@pytest.fixture(scope="module")
def table(root: Path) -> list[dict]:
    """float64 statistics with the teacher's weights rounded to bf16."""
    rounded = root / "rounded"
    rounded.mkdir()
    for file in (root / "teacher").iterdir():
        (rounded / file.name).write_bytes(file.read_bytes())
    weights = load_file(rounded / "model.safetensors")
    weights = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    save_file(weights, rounded / "model.safetensors", metadata={"format": "pt"})
    return reference.statistics_table(
        reference.load_float64(root / "student"),
        reference.load_float64(rounded),
        reference.read_jsonl(root / "rollouts.jsonl"),
        vocab_size=STUDENT_VOCAB,
    )


@pytest.mark.parametrize("ranks, flags", [(1, ()), (4, TP2PP2SP)], ids=["one", "tp2pp2sp"])
def test_statistics_of_a_bf16_teacher(pool, root: Path, table: list[dict], ranks: int, flags: tuple[str, ...]) -> None:
    pool(ranks).run(score, root, "bf16.jsonl", "--teacher-dtype=bf16", *flags)
    got = reference.read_jsonl(root / "bf16.jsonl")
    assert [row["token_id"] for row in got] == [row["token_id"] for row in table]

    def errors(name: str) -> torch.Tensor:
        return torch.tensor([a[name] - b[name] for a, b in zip(got, table, strict=True)]).abs()

    for name in ("H", "student_logprob", "student_mass"):  # the student is fp32
        assert errors(name).max() < 1e-4, name
    for name in ("teacher_logprob", "teacher_entropy", "kl_forward", "kl_reverse", "D"):
        assert errors(name).mean() < 0.03, name
        assert errors(name).max() < 0.2, name
        assert errors(name).max() > 1e-4, f"{name}: activations of bf16 must show"
    assert errors("C").max() < 0.02


def built(root: Path, teacher_dtype: str | None, bf16: bool) -> dict[str, object]:
    """Runs in every rank: what exists of the teacher once everything is set up."""
    from megatron_taopd.training.loop import wrap_student
    from megatron_taopd.training.optimizer import build_optimizer
    from megatron_taopd.training.pair import load_pair

    parallel = ParallelConfig()
    distributed.initialize(parallel, seed=1)
    try:
        models = ModelPairConfig(
            student=str(root / "student"), teacher=[str(root / "teacher")], teacher_dtype=teacher_dtype
        )
        pair = load_pair(models, parallel, PrecisionConfig(bf16=bf16), train_student=True)
        (student,) = wrap_student(pair, use_distributed_optimizer=False, bf16=bf16)
        optimizer = build_optimizer(OptimizationConfig(), [student], bf16=bf16)
        teacher = list(pair.teachers[0].model.module.parameters())
        theirs = {p.untyped_storage().data_ptr() for p in teacher}
        groups = [p for group in optimizer.param_groups for p in group["params"]]
        buffers = [*student.buffers, *student.expert_parallel_buffers]
        return {
            "teacher": {p.dtype for p in teacher},
            "student": {p.dtype for p in pair.student.module.parameters()},
            "trained": any(p.requires_grad for p in teacher),
            "gradients": any(p.grad is not None or hasattr(p, "main_grad") for p in teacher),
            "shared": any(p.untyped_storage().data_ptr() in theirs for p in groups),
            "sizes": (
                sum(p.numel() for p in groups),
                sum(p.numel() for buffer in buffers for p in buffer.params),
                sum(p.numel() for p in pair.student.module.parameters()),
            ),
        }
    finally:
        distributed.shutdown()


@pytest.mark.parametrize(
    "teacher_dtype, bf16, teacher, student",
    [
        ("bf16", False, torch.bfloat16, torch.float32),
        ("fp32", True, torch.float32, torch.bfloat16),
        (None, True, torch.bfloat16, torch.bfloat16),
    ],
)
def test_no_gradient_buffer_or_main_copy_of_the_teacher(
    pool, root: Path, teacher_dtype: str | None, bf16: bool, teacher: torch.dtype, student: torch.dtype
) -> None:
    (found,) = pool(1).run(built, root, teacher_dtype, bf16)
    assert (found["teacher"], found["student"]) == ({teacher}, {student})
    assert (found["trained"], found["gradients"], found["shared"]) == (False, False, False)
    in_optimizer, in_buffers, of_student = found["sizes"]
    assert in_optimizer == in_buffers == of_student


def train(root: Path, out: str, *flags: str) -> None:
    cli.run(
        [
            "train",
            f"--student={root / 'student'}",
            f"--teacher={root / 'teacher'}",
            "--rollout-engine=file",
            f"--rollout-data={root / 'rollouts.jsonl'}",
            "--micro-batch-size=2",
            "--train-iters=2",
            "--selector=random",
            "--lr=1e-4",
            f"--log-dir={root / out}",
            *flags,
        ]
    )


@pytest.mark.parametrize("student", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks, flags", [(1, ()), (4, TP2PP2SP)], ids=["one", "tp2pp2sp"])
def test_training_with_mixed_types(pool, root: Path, ranks: int, flags: tuple[str, ...], student: str) -> None:
    """Forward KL at the teacher's other type is that of one type, up to bf16."""
    mixed = ["--bf16", "--teacher-dtype=fp32"] if student == "bf16" else ["--teacher-dtype=bf16"]
    out = f"{student}-{ranks}"
    pool(1).run(train, root, f"{out}-plain")
    pool(ranks).run(train, root, f"{out}-mixed", *mixed, *flags)
    plain, got = (
        [json.loads(line) for line in (root / f"{out}-{how}" / "metrics.jsonl").read_text().splitlines()]
        for how in ("plain", "mixed")
    )
    for a, b in zip(plain, got, strict=True):
        assert b["num_kept_tokens"] == a["num_kept_tokens"]
        for key in ("loss", "kl_forward", "mean_D", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=0.03), key
            assert b[key] != a[key], f"{key}: bf16 must show"
