"""Softmax quantities and top-K of a cut vocabulary: values and gradients equal one process in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_taopd.errors import ConfigError
from megatron_taopd.ops import HeadShard, entropy, gather_ids, log_probs, log_sum_exp, top_k
from megatron_taopd.ops.collectives import sum_over_shards
from megatron_taopd.ops.vocab import mark_ids
from megatron_taopd.testing import WorkerPool

R, VOCAB, PADDED = 5, 14, 24  # at 4 ranks: 6, 6, 2 and 0 real ids


def my_shard(matrix_RV: torch.Tensor) -> tuple[torch.Tensor, int]:
    group = torch.distributed.group.WORLD
    local = PADDED // group.size()
    start = group.rank() * local
    return matrix_RV[:, start : min(start + local, VOCAB)].clone(), start


def matrix() -> torch.Tensor:
    return 30 * torch.randn(R, VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def softmax_quantities(ids_RK: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each quantity and the gradient of a replicated loss made of it, for this rank's ids."""
    group = torch.distributed.group.WORLD
    results = {}
    for name in ("log_sum_exp", "entropy", "gather_ids", "log_probs"):
        logits, start = my_shard(matrix())
        logits.requires_grad_()
        if name == "log_sum_exp":
            value = log_sum_exp(logits, group)
        elif name == "entropy":
            value = entropy(logits, group)
        elif name == "gather_ids":
            value = gather_ids(logits, ids_RK, vocab_start=start, group=group)
        else:
            value = sum_over_shards((log_probs(logits, group) ** 2).sum(-1), group)
        (value**2).sum().backward()
        results[name] = (value.detach(), logits.grad)
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_value_and_gradient(pool: Callable[[int], WorkerPool], ranks: int) -> None:
    ids_RK = torch.randint(0, VOCAB, (R, 3), generator=torch.Generator().manual_seed(4))
    naive = {
        "log_sum_exp": lambda x: x.exp().sum(-1).log(),
        "entropy": lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1),
        "gather_ids": lambda x: x.gather(-1, ids_RK),
        "log_probs": lambda x: (x.log_softmax(-1) ** 2).sum(-1),
    }
    answers = pool(ranks).run(softmax_quantities, ids_RK)
    for name, function in naive.items():
        logits = matrix().requires_grad_()
        want = function(logits)
        (want**2).sum().backward()
        for answer in answers:
            torch.testing.assert_close(answer[name][0], want.detach(), msg=name)
        torch.testing.assert_close(torch.cat([a[name][1] for a in answers], -1), logits.grad, msg=name)


def best(logits_RV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    local, start = my_shard(logits_RV)
    return top_k(local, k, vocab_start=start, vocab_size=VOCAB, group=torch.distributed.group.WORLD)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_k_is_a_total_order(pool: Callable[[int], WorkerPool], ranks: int, dtype: torch.dtype) -> None:
    """Few distinct values, so that ties cross shards and the boundary; all-equal rows and both zeros among
    them."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randint(-1, 2, (R, VOCAB), generator=generator).to(dtype)
    logits[0] = 0.5
    logits[1, ::2] = -0.0
    for k in (1, 3, 7, VOCAB):
        order = [sorted(range(VOCAB), key=lambda v: (-row[v].item(), v))[:k] for row in logits]
        for values, ids in pool(ranks).run(best, logits, k):
            assert ids.tolist() == order, k
            torch.testing.assert_close(values, logits.gather(-1, ids), rtol=0, atol=0)


def test_support_larger_than_vocabulary() -> None:
    with pytest.raises(ConfigError, match="--support-k 15 must be between 1 and the vocabulary size 14"):
        top_k(matrix(), 15, vocab_start=0, vocab_size=VOCAB, group=None)


def test_mark_ids() -> None:
    marked = mark_ids(torch.tensor([[4, 6, 0], [5, 5, 99]]), vocab_start=4, num_valid=3)
    assert marked.tolist() == [[True, False, True], [False, True, False]]


def test_head_shard_never_computes_padding() -> None:
    weight = torch.arange(16.0).view(8, 2)
    hidden = torch.tensor([[1.0, 1.0]])
    assert HeadShard(weight, 0, 3).logits(hidden).tolist() == [[1.0, 5.0, 9.0]]
    assert HeadShard(weight, 8, 11).num_valid == 3
    assert HeadShard(weight, 16, 11).logits(hidden).shape == (1, 0)


@pytest.mark.parametrize(
    ("rows", "chunk_bytes", "slices"),
    [
        (5, 4 * 8 * 2, [(0, 2), (2, 4), (4, 5)]),
        (2, 1, [(0, 1), (1, 2)]),
        (0, 64, [(0, 0)]),
        (3, 1000, [(0, 3)]),
    ],
)
def test_chunks(rows: int, chunk_bytes: int, slices: list[tuple[int, int]]) -> None:
    head = HeadShard(torch.zeros(8, 2), 0, 8)
    assert [(s.start, s.stop) for s in head.chunks(rows, chunk_bytes)] == slices


def test_shards_that_do_not_line_up_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="head shards differ"):
        HeadShard(torch.zeros(8, 2), 0, 8).check_lines_up_with(HeadShard(torch.zeros(9, 2), 0, 8))
