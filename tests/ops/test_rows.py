"""Row gathering: value, and the gradient of a vocab-parallel head behind it, with and without sequence
parallelism."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_taopd.ops import gather_rows
from megatron_taopd.ops.collectives import sum_over_shards
from megatron_taopd.testing import WorkerPool
from tests.traffic import Calls, counted_collectives

S, B, H, V = 12, 3, 5, 24


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(S, B, H, generator=generator, dtype=torch.float64)
    return hidden, torch.randn(V, H, generator=generator, dtype=torch.float64)


def run_rows(index: torch.Tensor, sequence_parallel: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, their loss behind a sharded head, and the gradient of this rank's hidden states."""
    group = torch.distributed.group.WORLD
    hidden, weight = tensors()
    if sequence_parallel:
        hidden = hidden.chunk(group.size(), dim=0)[group.rank()]
    hidden = hidden.clone().requires_grad_()
    rows = gather_rows(hidden, index, group=group, sequence_parallel=sequence_parallel)
    local = rows @ weight.chunk(group.size(), dim=0)[group.rank()].t()
    loss = sum_over_shards(local.square().sum(), group)
    loss.backward()
    return rows.detach(), loss.detach(), hidden.grad


INDEX = {
    "spread": torch.tensor([0, 35, 7, 8, 20, 13]),
    "one rank's rows": torch.tensor([1, 2, 0]),
    "unevenly spread": torch.tensor([1, 35, 2, 0, 3, 10, 20, 30, 12]),
    "mostly one rank's": torch.tensor([30, 4, 1, 2, 20, 0, 3, 5, 8]),
    "one row": torch.tensor([35]),
    "a row twice": torch.tensor([4, 4]),
    "no rows": torch.tensor([], dtype=torch.int64),
}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_value_and_gradient(pool: Callable[[int], WorkerPool], ranks: int, sequence_parallel: bool) -> None:
    for name, index in INDEX.items():
        hidden, weight = tensors()
        hidden.requires_grad_()
        want = hidden.reshape(S * B, H)[index]
        want_loss = (want @ weight.t()).square().sum()
        want_loss.backward()
        answers = pool(ranks).run(run_rows, index, sequence_parallel)
        for rank, (rows, loss, grad) in enumerate(answers):
            torch.testing.assert_close(rows, want.detach(), msg=name)
            torch.testing.assert_close(loss, want_loss.detach(), msg=name)
            expected = hidden.grad.chunk(ranks)[rank] if sequence_parallel else hidden.grad
            torch.testing.assert_close(grad, expected, msg=name)


def traffic(index: torch.Tensor) -> Calls:
    with counted_collectives() as calls:
        run_rows(index, sequence_parallel=True)
    return [call for call in calls if call[1] > 8]  # without the sum of the loss


@pytest.mark.parametrize(
    ("name", "most"), [("spread", 3), ("unevenly spread", 4), ("mostly one rank's", None), ("one row", None)]
)
def test_rows_travel_by_what_moves_less(pool: Callable[[int], WorkerPool], name: str, most: int | None) -> None:
    """Of 4 ranks, each with 9 of the 36 rows: each gets all kept rows, and the gradients of its own alone, unless the
    fullest rank would move more than a sum over all ranks does."""
    row, index = 8 * H, INDEX[name]
    for calls in pool(4).run(traffic, index):
        if most is None:
            assert calls == [("all_reduce", len(index) * row)] * 2
        else:
            assert calls == [("all_gather", most * row), ("all_to_all_single", len(index) * row)]


def test_one_process_without_a_group() -> None:
    hidden, _ = tensors()
    rows = gather_rows(hidden, torch.tensor([S * B - 1, 4]), group=None, sequence_parallel=True)
    torch.testing.assert_close(rows, torch.stack([hidden[S - 1, B - 1], hidden[1, 1]]))


def bf16_rows() -> tuple[torch.Tensor, torch.Tensor]:
    hidden = tensors()[0].bfloat16().chunk(2, dim=0)[torch.distributed.get_rank()].clone().requires_grad_()
    rows = gather_rows(hidden, INDEX["spread"], group=torch.distributed.group.WORLD, sequence_parallel=True)
    rows.sum().backward()
    return rows.detach(), hidden.grad


def test_bf16_rows_travel_unchanged(pool: Callable[[int], WorkerPool]) -> None:
    want = tensors()[0].bfloat16().reshape(S * B, H)[INDEX["spread"]]
    counts = torch.bincount(INDEX["spread"], minlength=S * B).view(S, B, 1).expand(S, B, H).chunk(2, dim=0)
    for rank, (rows, grad) in enumerate(pool(2).run(bf16_rows)):
        assert torch.equal(rows, want)
        assert grad.dtype == torch.bfloat16 and torch.equal(grad, 2.0 * counts[rank].bfloat16())
