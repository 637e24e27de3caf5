"""Figures of a batch that tell whether its selection can mean something. R rows of this rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_taopd.ops.collectives import Group, all_reduce_sum
from megatron_taopd.ops.order import distributed_quantiles
from megatron_taopd.teachability.statistics import TokenStatistics

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
POSITION_EDGES = (0, 16, 64, 256, 1024, 4096)
"""Position buckets begin here; the last one is open."""
SMALLEST_C = 1e-30
"""log C_q05 is taken of at least this."""


@torch.no_grad()
def batch_figures(
    statistics: TokenStatistics,
    *,
    keep_R: torch.Tensor,
    position_R: torch.Tensor,
    token_ids_R: torch.Tensor,
    stop_ids: Sequence[int],
    entropy_support: str,
    group: Group,
) -> dict[str, float]:
    """Figures over all ranks of the group, which call it together; none depends on how rows are spread.

    ``X_q05`` … ``X_q95`` of D, C and H, ``log_C_q05``; ``quadrant_share/Q1`` … and ``quadrant_keep_ratio/Q1`` …: which
    share of the rows lies in a quadrant and which part of those is kept (Q1: H and D at or above their medians, Q2: H
    alone, Q3: D alone, Q4: neither; a value that is not finite is below); ``keep_ratio_by_position/0-15`` …;
    ``stop_token_share``, ``stop_token_keep_ratio`` and ``stop_token_teacher_logprob`` of rows whose token is one of
    ``stop_ids``. A figure of rows that are nowhere is left out.
    """
    columns = {
        "D": statistics.D,
        "C": statistics.C,
        "H": statistics.H if entropy_support == "full" else statistics.H_topk,
    }
    quantiles = dict(zip(columns, distributed_quantiles(list(columns.values()), QUANTILES, group), strict=True))
    figures = {
        f"{name}_q{round(100 * q):02d}": value
        for name, values in quantiles.items()
        for q, value in zip(QUANTILES, values, strict=True)
        if not math.isnan(value)
    }
    if "C_q05" in figures:
        figures["log_C_q05"] = math.log(max(figures["C_q05"], SMALLEST_C))

    high = {name: _at_least(columns[name], quantiles[name][QUANTILES.index(0.5)]) for name in ("H", "D")}
    masks = {
        "Q1": high["H"] & high["D"],
        "Q2": high["H"] & ~high["D"],
        "Q3": ~high["H"] & high["D"],
        "Q4": ~high["H"] & ~high["D"],
    }
    buckets = _position_buckets(position_R)
    stop_R = torch.isin(token_ids_R, torch.tensor(list(stop_ids), dtype=torch.int64, device=token_ids_R.device))
    masks |= {**buckets, "stop": stop_R, "all": torch.ones_like(stop_R)}
    sums = torch.stack([part for mask in masks.values() for part in (mask.sum(), (mask & keep_R).sum())]).double()
    at_stop = statistics.teacher_logprob.double().where(stop_R, 0.0).sum()
    *counts, stop_logprob = all_reduce_sum(torch.cat([sums, at_stop[None]]), group).tolist()
    rows = dict(zip(masks, counts[::2], strict=True))
    kept = dict(zip(masks, counts[1::2], strict=True))
    keep_ratio = {name: kept[name] / count for name, count in rows.items() if count}

    valid = max(rows["all"], 1.0)
    for name in ("Q1", "Q2", "Q3", "Q4"):
        figures[f"quadrant_share/{name}"] = rows[name] / valid
        if name in keep_ratio:
            figures[f"quadrant_keep_ratio/{name}"] = keep_ratio[name]
    figures |= {f"keep_ratio_by_position/{name}": keep_ratio[name] for name in buckets if name in keep_ratio}
    figures["stop_token_share"] = rows["stop"] / valid
    if rows["stop"]:
        figures["stop_token_keep_ratio"] = keep_ratio["stop"]
        figures["stop_token_teacher_logprob"] = stop_logprob / rows["stop"]
    return figures


def _at_least(values_R: torch.Tensor, median: float) -> torch.Tensor:
    return (values_R.double() >= median) & values_R.isfinite()


def _position_buckets(position_R: torch.Tensor) -> dict[str, torch.Tensor]:
    masks = {}
    for first, end in zip(POSITION_EDGES, [*POSITION_EDGES[1:], None], strict=True):
        name = f"{first}+" if end is None else f"{first}-{end - 1}"
        masks[name] = (position_R >= first) & (position_R < (2**62 if end is None else end))
    return masks
