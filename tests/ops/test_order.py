"""Order statistics over ranks are exact: to the bit, for any spread of rows, with ties and special values."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from megatron_taopd.ops import distributed_quantiles, first_n
from megatron_taopd.ops.order import ascending_key, descending_key
from megatron_taopd.testing import WorkerPool

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


def my_rows(num_rows: int, seed: int) -> torch.Tensor:
    """This rank's share of the rows under a random, uneven spread that leaves one rank empty."""
    if not torch.distributed.is_initialized():
        return torch.arange(num_rows)
    ranks = torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, max(ranks - 1, 1), (num_rows,), generator=generator)
    return (owner == torch.distributed.get_rank()).nonzero()[:, 0]


def world() -> torch.distributed.ProcessGroup | None:
    return torch.distributed.group.WORLD if torch.distributed.is_initialized() else None


def quantiles_of(columns: list[torch.Tensor], seed: int) -> list[list[float]]:
    return distributed_quantiles([c[my_rows(len(c), seed)] for c in columns], QUANTILES, world())


def interesting_columns() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(101, generator=generator)
    rounded = (normal * 2).round()
    wide = torch.exp(normal.double() * 40) * torch.where(normal > 0.5, -1.0, 1.0)
    holes = normal.clone()
    holes[::7], holes[1::7], holes[2::7] = math.nan, math.inf, -math.inf
    return [
        normal,
        rounded,  # many ties, and both zeros
        wide,  # magnitudes from 1e-30 to 1e30, in float64
        holes,
        torch.tensor([2.5]),
        torch.tensor([1.0, 4.0]),
        torch.full((9,), -0.0),
        torch.full((3,), math.nan),
        torch.zeros(0),
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_quantiles_equal_numpy(pool: Callable[[int], WorkerPool], ranks: int) -> None:
    columns = interesting_columns()
    for seed in (0, 1):
        answers = pool(ranks).run(quantiles_of, columns, seed)
        for rank_answer in answers:
            for column, got in zip(columns, rank_answer, strict=True):
                finite = column[column.isfinite()].double().numpy()
                if not len(finite):
                    assert all(math.isnan(q) for q in got)
                    continue
                np.testing.assert_allclose(got, np.quantile(finite, QUANTILES), rtol=1e-14, atol=0)
                assert got[0] == finite.min() and got[-1] == finite.max()


def test_quantiles_by_hand() -> None:
    """0, 10, 20: the 5 % quantile lies a tenth of the way from the first to the second."""
    (got,) = distributed_quantiles([torch.tensor([20.0, 0.0, 10.0])], (0.05, 0.5, 0.95), None)
    assert got == pytest.approx([1.0, 10.0, 19.0])


def first_rows(keys: list[torch.Tensor], n: int, seed: int) -> list[int]:
    rows = my_rows(len(keys[0]), seed)
    return rows[first_n([key[rows] for key in keys], n, world())].tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_first_n_equals_sorting(pool: Callable[[int], WorkerPool], ranks: int) -> None:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randint(-2, 3, (60,), generator=generator)
    fine = torch.randn(60, generator=generator).round(decimals=1)
    keys = [coarse, descending_key(fine), torch.randperm(60, generator=generator)]
    order = sorted(range(60), key=lambda i: (int(coarse[i]), -float(fine[i]), int(keys[2][i])))
    for n in (0, 1, 13, 14, 30, 59, 60, 70):
        taken = sorted(sum(pool(ranks).run(first_rows, keys, n, n), []))
        assert taken == sorted(order[:n]), n


def test_keys_that_do_not_tell_rows_apart_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="3 rows share all keys and 2 of them are wanted"):
        first_n([torch.tensor([1, 1, 1, 0])], 3, None)


def test_keys_sort_as_the_values_do() -> None:
    values = [-math.inf, -1e300, -1.5, -1e-300, -0.0, 0.0, 5e-324, 1e-3, 2.0, math.inf]
    keys = ascending_key(torch.tensor(values, dtype=torch.float64))
    assert keys[4] == keys[5]
    assert (keys[1:] - keys[:-1] > 0).tolist() == [True] * 4 + [False] + [True] * 4
    assert torch.equal(descending_key(torch.tensor(values)).argsort(), (~ascending_key(torch.tensor(values))).argsort())
