"""Tiles cover the whole, within their memory."""

from __future__ import annotations

import pytest
import torch

from megatron_taopd.ops.tiles import TilePlan, row_blocks


@pytest.mark.parametrize(
    ("num_bytes", "num_rows", "num_ids", "plan"),
    [
        (64 * 2**20, 2048, 151936, TilePlan(1024, 16384)),  # rows first, then width
        (2**20, 2048, 151936, TilePlan(64, 4096)),  # not so many rows that tiles get narrow
        (64 * 2**20, 2048, 8000, TilePlan(1024, 8000)),  # the whole shard
        (64 * 2**20, 3, 151936, TilePlan(3, 151936)),
        (1, 5, 100, TilePlan(1, 32)),
        (1, 0, 20, TilePlan(1, 20)),
    ],
)
def test_plan(num_bytes: int, num_rows: int, num_ids: int, plan: TilePlan) -> None:
    assert TilePlan.within(num_bytes, num_rows=num_rows, num_ids=num_ids) == plan
    if num_bytes > 4 * 32:
        assert 4 * plan.rows * plan.width <= num_bytes


def test_slices_cover_everything_once() -> None:
    plan = TilePlan(3, 32)
    assert [(s.start, s.stop) for s in plan.row_slices(7)] == [(0, 3), (3, 6), (6, 7)]
    assert [(s.start, s.stop) for s in plan.row_slices(0)] == [(0, 0)]
    assert [(s.start, s.stop) for s in plan.column_slices(70)] == [(0, 32), (32, 64), (64, 70)]
    assert list(plan.column_slices(0)) == []
    blocks = list(row_blocks(100, 2**18, torch.device("cpu")))
    assert len(blocks) == 50 and blocks[-1].stop == 100
