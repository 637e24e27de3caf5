"""A run that goes on at another layout: virtual stages, then context parallelism, then one rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_taopd import cli
from tests.oracle.cases import make_pair, make_rollouts

# (ranks, steps in all, flags)
LEGS: tuple[tuple[int, int, tuple[str, ...]], ...] = (
    (2, 1, ("--pipeline-model-parallel-size=2", "--num-virtual-stages-per-pipeline-rank=2")),
    (2, 2, ("--context-parallel-size=2", "--packed-sequences")),
    (2, 3, ("--pipeline-model-parallel-size=2", "--num-virtual-stages-per-pipeline-rank=2")),
    (1, 4, ()),
)


def train(root: Path, name: str, train_iters: int, flags: tuple[str, ...], load: bool) -> None:
    cli.run(
        [
            "train",
            f"--student={root / 'student'}",
            f"--teacher={root / 'teacher'}",
            "--rollout-engine=file",
            f"--rollout-data={root / 'rollouts.jsonl'}",
            "--global-batch-size=4",
            f"--train-iters={train_iters}",
            "--lr-decay-iters=4",
            "--lr=1e-3",
            "--adam-eps=1e-3",
            "--loss=reverse_kl",
            f"--log-dir={root / name}",
            f"--save={root / name / 'checkpoints'}",
            f"--export-hf={root / name / 'hf'}",
            *([f"--load={root / name / 'checkpoints'}"] if load else []),
            *flags,
        ]
    )


def test_same_run_whatever_the_layouts(pool, tmp_path: Path) -> None:
    make_pair(tmp_path, "qwen3-deep", tied_student=True)
    make_rollouts(tmp_path / "rollouts.jsonl", count=16, seed=6)
    pool(1).run(train, tmp_path, "straight", 4, (), False)
    for number, (ranks, train_iters, flags) in enumerate(LEGS):
        pool(ranks).run(train, tmp_path, "legs", train_iters, flags, number > 0)
    straight, legs = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("straight", "legs")
    )
    assert len(straight) == len(legs) == 4
    for a, b in zip(straight, legs, strict=True):
        for key in ("loss", "grad_norm", "num_kept_tokens", "mean_D", "learning_rate"):
            assert b[key] == pytest.approx(a[key], rel=2e-4), (a["iteration"], key)
    start = load_file(tmp_path / "student" / "model.safetensors")
    first, after = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("straight", "legs"))
    moved = sum((first[n] - start[n]).double().square().sum() for n in start).sqrt()
    apart = sum((first[n] - after[n]).double().square().sum() for n in start).sqrt()
    assert moved > 0 and apart / moved < 1e-2
    assert all(torch.isfinite(after[n]).all() for n in after)
