"""Row gathering: value, and the gradient of a vocab-parallel head behind it, with and without sequence
parallelism."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_taopd.ops import gather_rows
from megatron_taopd.ops.collectives import sum_over_shards
from megatron_taopd.testing import WorkerPool

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


def test_one_process_without_a_group() -> None:
    hidden, _ = tensors()
    rows = gather_rows(hidden, torch.tensor([S * B - 1, 4]), group=None, sequence_parallel=True)
    torch.testing.assert_close(rows, torch.stack([hidden[S - 1, B - 1], hidden[1, 1]]))


def bf16_rows() -> torch.Tensor:
    hidden = tensors()[0].bfloat16().chunk(2, dim=0)[torch.distributed.get_rank()].clone().requires_grad_()
    rows = gather_rows(hidden, INDEX["spread"], group=torch.distributed.group.WORLD, sequence_parallel=True)
    rows.sum().backward()
    return rows.detach()


def test_bf16_rows_travel_unchanged(pool: Callable[[int], WorkerPool]) -> None:
    want = tensors()[0].bfloat16().reshape(S * B, H)[INDEX["spread"]]
    for rows in pool(2).run(bf16_rows):
        assert torch.equal(rows, want)
