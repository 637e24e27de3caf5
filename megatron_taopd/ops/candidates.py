"""Exact top-K in a total order (higher value first, then lower id), found in tiles and merged.

Shapes: R rows, W consecutive ids of a tile, N blocks of a row, C candidates, K results. ``torch.topk`` leaves
open which of equal values it returns; here no two candidates are equal, so that the answer does not depend
on how ids are spread over tiles and ranks.
"""

from __future__ import annotations

import torch

BLOCK = 32
"""Ids whose maximum stands for them in the first pass."""
ABSENT_ID = 2**31 - 1
"""Id in slots that no real id fills (their value is -inf); it sorts behind every id."""
_LOW_32 = (1 << 32) - 1
_GROUPS_PER_K = 4


def order_best_first(values_RC: torch.Tensor, ids_RC: torch.Tensor, k: int) -> torch.Tensor:
    """Columns [R, K] of the k best candidates, best first.

    Args:
        values_RC: fp32 or fp64; at least k columns.
        ids_RC: int64 in [0, 2^31).
    """
    if values_RC.dtype == torch.float32:
        # One integer holds both: the value's bits made to sort as the value does, then the id, lowest best.
        bits = (values_RC + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
        key = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (_LOW_32 - ids_RC)
        return key.topk(k, dim=-1).indices
    by_id = ids_RC.argsort(dim=-1)
    by_value = values_RC.gather(-1, by_id).argsort(dim=-1, descending=True, stable=True)
    return by_id.gather(-1, by_value[:, :k])


def padded_width(width: int) -> int:
    """Width of a tile whose columns fill whole blocks; the columns past ``width`` must hold -inf."""
    return -(-width // BLOCK) * BLOCK


def block_maxima(values_RW: torch.Tensor) -> torch.Tensor:
    """Maxima [R, N] over runs of :data:`BLOCK` ids of a tile of :func:`padded_width`."""
    return values_RW.unflatten(-1, (-1, BLOCK)).amax(-1)


def find_candidates(
    values_RW: torch.Tensor, block_max_RN: torch.Tensor, k: int, floor_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of all ids that may belong to a row's k best: those that reach a lower bound of the k-th best.

    The bound is the k-th best of the maxima of disjoint groups of ids, or ``floor_R`` where that is higher. Blocks
    below it are passed over, so that little more than k ids a row are looked at one by one.

    Args:
        values_RW: one tile of the row, contiguous, of :func:`padded_width`.
        block_max_RN: its :func:`block_maxima`.
        floor_R: k-th best value among the ids seen so far (-inf where they are fewer).

    Returns:
        Places in the row [R, C], and which of them count, bool [R, C].
    """
    num_rows, num_blocks = block_max_RN.shape
    bound_R = torch.maximum(floor_R, _kth_best_bound(values_RW, block_max_RN, k))
    row_B, block_B = (block_max_RN >= bound_R[:, None]).nonzero(as_tuple=True)
    blocks_BW = values_RW.view(-1, BLOCK).index_select(0, row_B * num_blocks + block_B)
    reaches_BW = (blocks_BW >= bound_R[row_B, None]) & (blocks_BW > -torch.inf)
    found_L, column_L = reaches_BW.nonzero(as_tuple=True)
    row_L, place_L = row_B[found_L], block_B[found_L] * BLOCK + column_L

    # The found places are in order of their rows: give each its slot within its row.
    count_R = torch.bincount(row_L, minlength=num_rows)
    slot_L = torch.arange(row_L.numel(), device=row_L.device) - (count_R.cumsum(0) - count_R)[row_L]
    num_slots = max(int(count_R.max()), 1) if num_rows else 1
    place_RC = torch.zeros(num_rows, num_slots, dtype=torch.int64, device=row_L.device)
    place_RC[row_L, slot_L] = place_L
    return place_RC, torch.arange(num_slots, device=row_L.device) < count_R[:, None]


def best_of_row(values_RV: torch.Tensor, k: int, first_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best (values, ids) of consecutive ids, each [R, K], best first; -inf and :data:`ABSENT_ID` where
    there are fewer."""
    num_rows, width = values_RV.shape
    missing = max(padded_width(width), BLOCK) - width
    tile_RW = torch.nn.functional.pad(values_RV, (0, missing), value=-torch.inf)
    floor_R = values_RV.new_full((num_rows,), -torch.inf)
    place_RC, counts_RC = find_candidates(tile_RW, block_maxima(tile_RW), k, floor_R)
    more = max(k - place_RC.shape[-1], 0)
    values = torch.nn.functional.pad(
        tile_RW.gather(-1, place_RC).where(counts_RC, -torch.inf), (0, more), value=-torch.inf
    )
    ids = torch.nn.functional.pad((place_RC + first_id).where(counts_RC, ABSENT_ID), (0, more), value=ABSENT_ID)
    order = order_best_first(values, ids, k)
    return values.gather(-1, order), ids.gather(-1, order)


def _kth_best_bound(values_RW: torch.Tensor, block_max_RN: torch.Tensor, k: int) -> torch.Tensor:
    """A value [R] that at least k of the row's ids reach; -inf where it has fewer."""
    num_rows, width = values_RW.shape
    num_blocks = block_max_RN.shape[-1]
    if width < k:
        return values_RW.new_full((num_rows,), -torch.inf)
    if num_blocks < k:
        return values_RW.topk(k, dim=-1).values[:, -1]
    num_groups = min(num_blocks, _GROUPS_PER_K * k)
    per_group = num_blocks // num_groups
    maxima = block_max_RN[:, : num_groups * per_group].unflatten(-1, (num_groups, per_group)).amax(-1)
    return maxima.topk(k, dim=-1).values[:, -1]
