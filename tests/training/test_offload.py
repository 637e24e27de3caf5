"""Host memory for weights and rows: nothing changes but where things lie. The CPU stands for the device here."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from pathlib import Path

import pytest
import torch

from megatron_taopd import cli
from megatron_taopd.platform import has_cuda
from megatron_taopd.training import pair, scopes
from megatron_taopd.training.offload import HeldRows, OffloadedWeights
from tests.oracle.cases import make_pair, make_rollouts

CPU = torch.device("cpu")


class Tied(torch.nn.Module):
    """Embedding and head are one parameter; two further parameters are views of one storage."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        flat = torch.randn(20, dtype=torch.bfloat16)
        self.first = torch.nn.Parameter(flat[:16].view(4, 4))
        self.second = torch.nn.Parameter(flat[16:])
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids) @ self.first.float() + self.second.float() * self.scale)


def test_weights_leave_and_return_to_the_bit() -> None:
    module, ids = Tied(), torch.arange(7)
    wanted = module(ids)
    before = {name: (p, p.clone()) for name, p in module.named_parameters()}
    view = module.head.weight.detach()[2:5]
    offloaded = OffloadedWeights(module, device=CPU)
    assert offloaded.num_bytes == 7 * 4 * 4 + 20 * 2  # each storage once
    for _ in range(2):
        assert all(p.untyped_storage().nbytes() == 0 for p in module.parameters())
        with offloaded.on_device():
            assert torch.equal(module(ids), wanted)
            for name, parameter in module.named_parameters():
                assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
            assert torch.equal(view, before["embedding.weight"][1][2:5])
            assert module.head.weight is module.embedding.weight
    assert module.scale.sum() == 8  # buffers stay


def test_an_error_inside_sends_the_weights_away_again() -> None:
    module = Tied()
    offloaded = OffloadedWeights(module, device=CPU)
    with pytest.raises(KeyError), offloaded.on_device():
        raise KeyError
    assert module.first.untyped_storage().nbytes() == 0


def test_what_must_stay_stays() -> None:
    module = Tied()
    offloaded = OffloadedWeights(module, device=CPU, stay=[module.head.weight])
    assert offloaded.num_bytes == 20 * 2
    assert module.embedding.weight.isfinite().all()
    assert OffloadedWeights(module, device=torch.device("meta")).num_bytes == 0  # parameters elsewhere


def test_trained_weights_cannot_be_offloaded() -> None:
    with pytest.raises(AssertionError, match=r"second is trained"):
        module = Tied()
        module.second.requires_grad_(True)
        OffloadedWeights(module, device=CPU)


@pytest.mark.parametrize("on_host", [False, True])
def test_held_rows_are_read_as_they_were(on_host: bool) -> None:
    rows = torch.randn(6, 3, dtype=torch.bfloat16)
    copy, gone = rows.clone(), weakref.ref(rows)
    held = HeldRows(rows, on_host=on_host)
    assert torch.equal(held.read(), copy) and held.read().device == CPU
    if on_host:  # it may be written over, and is not kept alive
        rows.zero_()
        del rows
        gc.collect()
        assert gone() is None
    keep = torch.tensor([1, 0, 0, 1, 1, 0]).bool()
    held.keep(keep)
    assert torch.equal(held.read(), copy[keep])
    assert held.read().untyped_storage().nbytes() == 3 * 3 * 2  # the others are gone
    held.keep(torch.zeros(3, dtype=torch.bool))
    assert held.read().shape == (0, 3)


@pytest.mark.skipif(not has_cuda(), reason="needs a GPU")
def test_device_memory_is_free_while_weights_and_rows_are_away() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    module = torch.nn.Linear(1024, 1024, device=device).requires_grad_(False)
    x, full = torch.randn(8, 1024, device=device), torch.cuda.memory_allocated()
    wanted = module(x)
    offloaded = OffloadedWeights(module, device=device)
    assert torch.cuda.memory_allocated() <= full + wanted.nbytes - 1024 * 1024 * 4
    assert all(host.is_pinned() for host in offloaded.host)
    with offloaded.on_device():
        assert torch.equal(module(x), wanted)
    rows = torch.randn(512, 1024, device=device)
    copy = rows.cpu()
    held = HeldRows(rows, on_host=True)
    before = torch.cuda.memory_allocated()
    del rows
    assert torch.cuda.memory_allocated() == before - 512 * 1024 * 4
    assert held.read().device == device and torch.equal(held.read().cpu(), copy)
    held.keep(torch.arange(512, device=device) % 2 == 0)
    assert torch.equal(held.read().cpu(), copy[::2])


@pytest.mark.skipif(has_cuda(), reason="a GPU has something to move")
def test_without_a_gpu_a_warning_says_that_nothing_moves(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("megatron_taopd")
    propagate, log.propagate = log.propagate, True
    try:
        assert not pair.can_offload("--offload-teacher")
    finally:
        log.propagate = propagate
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "--offload-teacher" in record.message and "no GPU" in record.message


# name -> (world size, flags)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "one-carried": (1, ("--selection-scope=carried",)),
    "tp2pp2": (4, ("--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2")),
}
NOT_TIMES = ("loss", "grad_norm", "mean_D", "kl_forward", "kept_kl_forward", "num_kept_tokens")


def train(root: Path, name: str, how: str, *, move: bool) -> None:
    """Runs in every rank; with ``move`` as on a machine whose device is called cpu."""
    original = pair.can_offload
    if move:
        pair.can_offload = scopes.can_offload = lambda flag: True
    try:
        cli.run(
            [
                "train",
                f"--student={root / 'student'}",
                f"--teacher={root / 'teacher'}",
                "--rollout-engine=file",
                f"--rollout-data={root / 'rollouts.jsonl'}",
                "--micro-batch-size=2",
                "--train-iters=3",
                "--lr=1e-3",
                f"--log-dir={root / name / how}",
                *(["--offload-teacher", "--offload-teacher-hidden"] if how != "plain" else []),
                *LAYOUTS[name][1],
            ]
        )
    finally:
        pair.can_offload = scopes.can_offload = original


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_is_the_same_to_the_bit(pool, tmp_path: Path, name: str, tied: bool) -> None:
    make_pair(tmp_path, "qwen3", tied_teacher=tied)
    make_rollouts(tmp_path / "rollouts.jsonl", seed=3)
    results = {}
    for how, move in (("plain", False), ("moved", True), ("warned", has_cuda())):
        pool(LAYOUTS[name][0]).run(train, tmp_path, name, how, move=move)
        rows = [json.loads(line) for line in (tmp_path / name / how / "metrics.jsonl").read_text().splitlines()]
        results[how] = [[row[key] for key in NOT_TIMES] for row in rows]
    assert len(results["plain"]) == 3
    assert results["moved"] == results["plain"] == results["warned"]
