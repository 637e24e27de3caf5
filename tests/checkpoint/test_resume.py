"""Resuming: to the bit on the same layout, and with the same optimizer state on any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_taopd.testing import WorkerPool
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.checkpoint.runs import Kind, resume, train_and_save

Pools = Callable[[int], WorkerPool]

KINDS = {
    "adam-tp2": (2, Kind(tp=2)),
    "sgd-pp2": (2, Kind(pp=2, optimizer="sgd")),
    "bf16-tp2": (2, Kind(tp=2, bf16=True)),
    "bf16-sgd-pp2": (2, Kind(pp=2, bf16=True, optimizer="sgd")),
    "distributed-dp2": (2, Kind(distributed_optimizer=True)),
    "bf16-distributed-dp2": (2, Kind(distributed_optimizer=True, bf16=True)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="module")
def tied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model(tmp_path_factory.mktemp("tied"), tied=True)


def _model(path: Path, *, tied: bool) -> Path:
    return save_tiny_hf_model(path, "qwen3", num_layers=2, hidden_size=32, ffn_size=48, tied=tied)


@pytest.mark.parametrize("name", KINDS)
def test_resume_is_exact_on_the_same_layout(pool: Pools, model: Path, tmp_path: Path, name: str) -> None:
    ranks, kind = KINDS[name]
    straight = pool(ranks).run(train_and_save, model, tmp_path, kind)
    resumed = pool(ranks).run(resume, model, tmp_path, replace(kind, seed=77))
    for before, after in zip(straight, resumed, strict=True):
        assert after["restored"]
        assert after["draws"] == before["draws"]
        assert after["reports"] == before["reports"]
        for key, value in before["weights"].items():
            assert torch.equal(after["weights"][key], value), key


@pytest.mark.parametrize(
    ("name", "ranks", "other"),
    [
        ("adam-tp2", 1, Kind()),
        ("adam-tp2", 4, Kind(tp=2, pp=2)),
        ("adam-tp2", 2, Kind(pp=2, padded_vocab_size=640)),
        ("sgd-pp2", 2, Kind(tp=2, optimizer="sgd")),
        ("bf16-tp2", 2, Kind(pp=2, bf16=True)),
        ("bf16-sgd-pp2", 2, Kind(tp=2, bf16=True, optimizer="sgd")),
        ("distributed-dp2", 2, Kind(tp=2, distributed_optimizer=True)),
        ("distributed-dp2", 4, Kind(tp=2, distributed_optimizer=True, padded_vocab_size=640)),
        ("bf16-distributed-dp2", 2, Kind(pp=2, distributed_optimizer=True, bf16=True)),
    ],
    ids=lambda value: str(value) if not isinstance(value, Kind) else f"tp{value.tp}pp{value.pp}",
)
def test_resume_on_another_layout(
    pool: Pools, model: Path, tied_model: Path, tmp_path: Path, name: str, ranks: int, other: Kind
) -> None:
    saved_ranks, kind = KINDS[name]
    # Tied embeddings are held twice with two stages and once with one: a change of that is the hard case.
    model = tied_model if (kind.pp, other.pp) in ((1, 2), (2, 1)) and not kind.bf16 else model
    straight = pool(saved_ranks).run(train_and_save, model, tmp_path, kind)
    resumed = pool(ranks).run(resume, model, tmp_path, other)
    assert not any(answer["restored"] for answer in resumed)
    tolerance = 2e-2 if kind.bf16 else 2e-5
    for answer in resumed:
        torch.testing.assert_close(
            torch.tensor(answer["reports"]),
            torch.tensor(straight[0]["reports"]),
            rtol=tolerance,
            atol=tolerance,
        )


def test_forgetting_the_optimizer_would_show(pool: Pools, model: Path, tmp_path: Path) -> None:
    """The comparison above has teeth: without Adam's moments the next steps differ by far more."""
    straight = pool(1).run(train_and_save, model, tmp_path, Kind())
    fresh = pool(1).run(_resume_weights_only, model, tmp_path)
    difference = torch.tensor(fresh[0]) - torch.tensor(straight[0]["reports"])
    assert difference.abs().max() > 1e-2


def _resume_weights_only(source: Path, directory: Path) -> list[tuple[float, float]]:
    from megatron_taopd.checkpoint import load_model_weights
    from tests.checkpoint.runs import Run

    run = Run(source, Kind())
    assert load_model_weights(directory, run.module) == 2
    run.scheduler.step(increment=2)
    return run.steps(2, 2)
