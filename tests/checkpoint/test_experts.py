"""Checkpoints of a mixture of experts: to the bit on the same layout, the same state on any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.checkpoint.runs import Kind, resume, train_and_save

KINDS = {
    "adam-ep2": (2, Kind(ep=2)),
    "bf16-distributed-ep2": (2, Kind(ep=2, bf16=True, distributed_optimizer=True)),
    "distributed-tp2ep2": (4, Kind(tp=2, ep=2, sp=True, distributed_optimizer=True)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts")
    return save_tiny_hf_model(path, "qwen3_moe", num_layers=2, hidden_size=32, num_experts=4)


@pytest.mark.parametrize(
    ("name", "ranks", "others"),
    [
        ("adam-ep2", 2, [Kind(), Kind(pp=2), Kind(tp=2, sp=True)]),
        ("bf16-distributed-ep2", 2, [Kind(pp=2, bf16=True, distributed_optimizer=True)]),
        ("distributed-tp2ep2", 2, [Kind(distributed_optimizer=True), Kind(ep=2, distributed_optimizer=True)]),
        ("distributed-tp2ep2", 4, [Kind(tp=2, etp=1, pp=2, sp=True, distributed_optimizer=True)]),
    ],
    ids=["adam", "bf16", "distributed", "distributed-etp1"],
)
def test_resume(pool, model: Path, tmp_path: Path, name: str, ranks: int, others: list[Kind]) -> None:
    saved_ranks, kind = KINDS[name]
    straight = pool(saved_ranks).run(train_and_save, model, tmp_path, kind)
    for before, after in zip(
        straight, pool(saved_ranks).run(resume, model, tmp_path, replace(kind, seed=77)), strict=True
    ):
        assert after["reports"] == before["reports"]
        for key, value in before["weights"].items():
            assert torch.equal(after["weights"][key], value), key
    tolerance = 2e-2 if kind.bf16 else 2e-5
    for other in others:
        for answer in pool(ranks).run(resume, model, tmp_path, other):
            torch.testing.assert_close(
                torch.tensor(answer["reports"]),
                torch.tensor(straight[0]["reports"]),
                rtol=tolerance,
                atol=tolerance,
                msg=lambda message, other=other: f"{other}: {message}",
            )
