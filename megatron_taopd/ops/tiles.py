"""How [rows, vocabulary] is cut so that products run at full speed, passes stay in cache and memory is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

FAR_BELOW = -1e30
"""Stands for the maximum over no ids: its sums vanish, and no NaN comes of it."""

_MAX_ROWS = 1024  # a matrix product gains nothing from more
_WIDE = 4096  # ids of a tile below which rows are given up rather than width
_CACHED_VALUES = 2**19  # of one buffer, for a pass over a block of rows on CPU


@dataclass(frozen=True)
class TilePlan:
    """Tiles of ``rows`` x ``width`` logits."""

    rows: int
    width: int

    @classmethod
    def within(cls, num_bytes: int, *, num_rows: int, num_ids: int) -> TilePlan:
        """The plan whose tile of fp32 logits fills at most ``num_bytes`` (but holds one row of 32 ids).

        Many rows come first, because the head is read once for each: a product of few rows with the whole head costs
        more than the same product in wide tiles. The same on every rank that passes the same numbers.

        Args:
            num_rows: rows in all.
            num_ids: ids of this rank's shard, padding included.
        """
        values = max(num_bytes // 4, 1)
        rows = max(1, min(num_rows, _MAX_ROWS, values // min(num_ids, _WIDE)))
        return cls(rows, min(num_ids, max(values // rows // 32 * 32, 32)))

    def row_slices(self, num_rows: int) -> Iterator[slice]:
        """Chunks of rows; one empty slice without rows, so that the collectives of all ranks pair up."""
        return slices(num_rows, self.rows) if num_rows else iter([slice(0, 0)])

    def column_slices(self, num_ids: int) -> Iterator[slice]:
        """Tiles of a chunk; none where the shard is padding alone."""
        return slices(num_ids, self.width)


def slices(total: int, step: int) -> Iterator[slice]:
    """[0, step), [step, 2 step), ... up to ``total``."""
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def row_blocks(num_rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Blocks of rows for elementwise passes: on CPU so few that they stay in cache, elsewhere all at once."""
    return slices(num_rows, rows_of_block(num_rows, width, device))


def rows_of_block(num_rows: int, width: int, device: torch.device) -> int:
    """Rows of the largest of :func:`row_blocks`."""
    if device.type != "cpu":
        return max(num_rows, 1)
    return max(1, min(num_rows, _CACHED_VALUES // max(width, 1)))
