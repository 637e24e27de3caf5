"""Exact order statistics and the first n rows of a total order, over rows that are spread over ranks.

Rows never travel. Values become 64-bit integers that sort alike, and a radix search narrows them eleven bits
at a time from histograms summed over the ranks; so the answers are exact and do not depend on how rows are
spread. One rank alone sorts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_taopd.ops.collectives import Group, all_reduce_sum, group_size

_DIGIT_BITS = 11
_SHIFTS = (55, 44, 33, 22, 11, 0)  # the first digit has 9 bits
_SIGN = torch.iinfo(torch.int64).min


def ascending_key(values: torch.Tensor) -> torch.Tensor:
    """int64 keys that sort as the float values do (-0.0 equals 0.0; NaN sorts last)."""
    bits = (values.double() + 0.0).view(torch.int64)
    return bits ^ ((bits >> 63) & torch.iinfo(torch.int64).max)


def descending_key(values: torch.Tensor) -> torch.Tensor:
    """int64 keys that sort highest value first."""
    return ~ascending_key(values)


def _float_of_key(keys: torch.Tensor) -> torch.Tensor:
    return (keys ^ ((keys >> 63) & torch.iinfo(torch.int64).max)).view(torch.float64)


def _kth_smallest(
    columns: Sequence[tuple[torch.Tensor, torch.Tensor]],
    column_of_query: Sequence[int],
    ranks_Q: torch.Tensor,
    group: Group,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each query the key of the given rank among its column's rows on all ranks.

    Args:
        columns: (keys, mask) pairs, 1-D; rows outside the mask do not count.
        column_of_query: index into ``columns`` for each of Q queries.
        ranks_Q: int64 ranks from 0, below the column's global count.

    Returns:
        Keys [Q] and the number of counted rows with a smaller key [Q].
    """
    if group_size(group) == 1:
        return _kth_smallest_here(columns, column_of_query, ranks_Q)
    device = ranks_Q.device
    wanted = ranks_Q.clone()
    prefix = torch.zeros_like(wanted)
    unsigned = [keys ^ _SIGN for keys, _ in columns]
    for step, shift in enumerate(_SHIFTS):
        bins = 2 ** (64 - shift if step == 0 else _DIGIT_BITS)
        histogram = torch.zeros(len(column_of_query), bins, dtype=torch.int64, device=device)
        for query, column in enumerate(column_of_query):
            counted = columns[column][1]
            if step:
                # The shift of a signed integer drags its sign along; only the digits known so far count.
                known = (1 << (64 - shift - _DIGIT_BITS)) - 1
                above = (unsigned[column] >> (shift + _DIGIT_BITS)) & known
                counted = counted & (above == prefix[query])
            digit = (unsigned[column] >> shift) & (bins - 1)
            histogram[query].scatter_add_(0, digit, counted.long())
        cumulative = all_reduce_sum(histogram, group).cumsum(-1)
        digit_Q = (cumulative <= wanted[:, None]).sum(-1)
        before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, digit_Q[:, None])[:, 0]
        wanted = wanted - before
        prefix = (prefix << (9 if step == 0 else _DIGIT_BITS)) | digit_Q
    return prefix ^ _SIGN, ranks_Q - wanted


def _kth_smallest_here(
    columns: Sequence[tuple[torch.Tensor, torch.Tensor]], column_of_query: Sequence[int], ranks_Q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where one rank has all rows: each column is sorted once. A column without counted rows gives 0."""
    ordered = [keys[mask].sort().values if mask.any() else keys.new_zeros(1) for keys, mask in columns]
    found, before = [], []
    for column, rank in zip(column_of_query, ranks_Q.tolist(), strict=True):
        found.append(ordered[column][rank])
        before.append(torch.searchsorted(ordered[column], found[-1]))
    return torch.stack(found), torch.stack(before)


def distributed_quantiles(
    columns: Sequence[torch.Tensor], quantiles: Sequence[float], group: Group
) -> list[list[float]]:
    """Quantiles by linear interpolation over the finite values of all ranks.

    Args:
        columns: 1-D float tensors of this rank's rows; lengths may differ between ranks.
        quantiles: in [0, 1].

    Returns:
        For each column its quantiles; NaN where it has no finite value anywhere.
    """
    pairs = [(ascending_key(column), column.isfinite()) for column in columns]
    counts = all_reduce_sum(torch.stack([mask.sum() for _, mask in pairs]), group).tolist()
    column_of_query, ranks, fractions = [], [], []
    for column, count in enumerate(counts):
        for q in quantiles:
            place = q * (count - 1) if count else 0.0
            low = math.floor(place)
            column_of_query += [column, column]
            ranks += [low, min(low + 1, max(count - 1, 0))]
            fractions.append(place - low)
    ranks_Q = torch.tensor(ranks, dtype=torch.int64, device=columns[0].device)
    keys, _ = _kth_smallest(pairs, column_of_query, ranks_Q, group)
    values = _float_of_key(keys).tolist()
    flat = [
        low + (high - low) * fraction for low, high, fraction in zip(values[::2], values[1::2], fractions, strict=True)
    ]
    per_column = [flat[i : i + len(quantiles)] for i in range(0, len(flat), len(quantiles))]
    return [row if count else [math.nan] * len(quantiles) for row, count in zip(per_column, counts, strict=True)]


def first_n(keys: Sequence[torch.Tensor], n: int, group: Group) -> torch.Tensor:
    """Mask of the first n rows over all ranks in the lexicographic order of the keys.

    Args:
        keys: int64 tensors [R], the most important first, lower first; together they tell all rows of all
            ranks apart.
        n: rows to take over all ranks, the same on every rank.

    Returns:
        bool [R]; True n times over all ranks (everywhere if there are fewer rows).
    """
    taken = torch.zeros_like(keys[0], dtype=torch.bool)
    open_rows = ~taken
    for key in keys:
        if int(all_reduce_sum(open_rows.sum(), group)) <= n:
            return taken | open_rows
        if n <= 0:
            return taken
        rank = torch.tensor([n - 1], dtype=torch.int64, device=key.device)
        threshold, before = _kth_smallest([(key, open_rows)], [0], rank, group)
        taken |= open_rows & (key < threshold)
        open_rows &= key == threshold
        n -= int(before)
    num_open = int(all_reduce_sum(open_rows.sum(), group))
    assert num_open <= n, f"{num_open} rows share all keys and {n} of them are wanted: the keys must tell rows apart"
    return taken | open_rows
