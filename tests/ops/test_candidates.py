"""Top-K through block maxima equals a stable sort of the whole row."""

from __future__ import annotations

import pytest
import torch

from megatron_taopd.ops.candidates import ABSENT_ID, best_of_row, block_maxima, find_candidates, order_best_first


def stable_sort(values: torch.Tensor, k: int) -> list[list[int]]:
    return [sorted(range(len(row)), key=lambda v: (-row[v], v))[:k] for row in values.tolist()]


def rows(kind: str, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    if kind == "distinct":
        return torch.randn(5, width, generator=generator)
    ties = torch.randint(-2, 3, (5, width), generator=generator).float()
    ties[0] = 1.0
    ties[1, ::2] = -0.0
    ties[1, 1::2] = 0.0
    return ties


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["distinct", "ties"])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 500, 4096, 5000])
def test_equal_a_stable_sort(width: int, kind: str, dtype: torch.dtype) -> None:
    values = rows(kind, width).to(dtype)
    for k in (1, 16, 40):
        best, ids = best_of_row(values, k, first_id=7)
        known = min(k, width)
        assert (ids[:, :known] - 7).tolist() == stable_sort(values, k)
        assert torch.equal(best[:, :known], values.gather(-1, ids[:, :known] - 7))
        assert (ids[:, known:] == ABSENT_ID).all() and (best[:, known:] == -torch.inf).all()


def test_few_are_looked_at() -> None:
    """Of distinct values little more than K are candidates, and with a floor only those that reach it."""
    values = torch.randn(64, 8192, generator=torch.Generator().manual_seed(0))
    nothing_known = torch.full((64,), -torch.inf)
    _, counts = find_candidates(values, block_maxima(values), 16, nothing_known)
    assert counts.sum(-1).min() >= 16 and counts.sum(-1).max() < 48
    floor = values.topk(3).values[:, -1]
    places, counts = find_candidates(values, block_maxima(values), 16, floor)
    assert (counts.sum(-1) == 3).all()
    assert torch.equal(values.gather(-1, places)[counts], values[values >= floor[:, None]])


def test_no_rows() -> None:
    best, ids = best_of_row(torch.zeros(0, 100), 4, 0)
    assert best.shape == ids.shape == (0, 4)


def test_negative_infinity_is_no_candidate() -> None:
    """Masked ids are never among the best, even where nothing else is left."""
    values = torch.tensor([[-torch.inf, 2.0, -torch.inf, 1.0]])
    assert best_of_row(values, 3, 0)[1].tolist() == [[1, 3, ABSENT_ID]]


def test_order_of_both_signs() -> None:
    values = torch.tensor([[-1.0, 3.0, -2.0, 3.0, 0.0]])
    assert order_best_first(values, torch.arange(5)[None], 5).tolist() == [[1, 3, 4, 0, 2]]
