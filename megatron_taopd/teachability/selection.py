"""Choose the kept positions of a rollout batch whose rows are spread over data- and context-parallel ranks.

The mask depends on the batch alone: not on how its responses are spread over ranks or micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch

from megatron_taopd.ops.collectives import Group, all_reduce_sum, group_size
from megatron_taopd.ops.order import distributed_quantiles, first_n
from megatron_taopd.teachability.config import SelectionConfig
from megatron_taopd.teachability.ranking import RankedRows, first_in_sample, rank_rows
from megatron_taopd.teachability.statistics import TokenStatistics

__all__ = ["Selection", "SelectionConfig", "select"]

LOW_COMPATIBILITY = 0.5
LOW_DIVERGENCE = 0.1  # nats
TEACHER_TOP = 5


@dataclass(kw_only=True)
class Selection:
    """Scores and keep mask of this rank's rows [R], and figures of the whole batch."""

    D_norm: torch.Tensor
    """float64 in [0, 1]."""
    C_norm: torch.Tensor
    """float64 in [0, 1], by quantiles whatever the compatibility scale."""
    H_norm: torch.Tensor
    """float64 in [0, 1]."""
    score: torch.Tensor
    """float64; what the selector ranked by."""
    keep: torch.Tensor
    """bool."""
    summary: dict[str, float]
    """The same on every rank: num_valid, num_budget (positions the ratio allows), num_kept, keep_ratio,
    threshold (lowest score within the budget), {D,C,H}_q05 and _q95, low_C_share (C < 0.5), low_D_share (D <
    0.1 nats), teacher_top5_share (response tokens among the teacher's best five, or best K below 5)."""


@torch.no_grad()
def select(
    statistics: TokenStatistics,
    *,
    sample_index_R: torch.Tensor,
    position_R: torch.Tensor,
    config: SelectionConfig,
    group: Group = None,
    sample_group: Group = None,
    seed: int = 0,
    step: int = 0,
) -> Selection:
    """Scores of all rows and the mask of those that are kept. All ranks of the group call it.

    ceil(ratio x valid rows of all ranks) rows with the highest score are kept; equal scores are told apart by
    the selector's raw leading quantity, then by sample and position (upstream mode: by position, then
    sample). Then every response adds its own best rows until it has ``min_keep_per_sample``.

    Args:
        statistics: of this rank's valid response positions; their number may differ between ranks, and be 0.
        sample_index_R: int64 index of the response in the whole batch.
        position_R: int64 position in the response.
        group: ranks that hold different rows; None means that all rows are here.
        sample_group: those of them that hold rows of the same responses (the context-parallel ranks); None means
            that every response lives on one rank.
        seed, step: of the ``random`` selector.
    """
    rows = rank_rows(
        statistics,
        sample_index_R=sample_index_R,
        position_R=position_R,
        config=config,
        quantiles=partial(distributed_quantiles, group=group),
        seed=seed,
        step=step,
    )
    num_valid = int(all_reduce_sum(torch.tensor(len(statistics), device=statistics.D.device), group))
    budget = keep_budget(config.resolved_keep_ratio, num_valid)
    within_budget = first_n(rows.order_keys, budget, group)
    keep = within_budget | first_in_sample(rows.order_keys, sample_index_R, config.resolved_min_keep, sample_group)
    return Selection(
        D_norm=rows.D_norm,
        C_norm=rows.C_norm,
        H_norm=rows.H_norm,
        score=rows.score,
        keep=keep,
        summary={
            "num_budget": float(budget),
            "threshold": lowest(rows.score[within_budget], group),
            **bounds_in_use(rows),
            **summarise(statistics, keep, config, group),
        },
    )


def bounds_in_use(rows: RankedRows) -> dict[str, float]:
    """The quantiles that scaled the rows."""
    lower = {f"{name}_q05": low for name, (low, _) in rows.bounds.items()}
    return lower | {f"{name}_q95": high for name, (_, high) in rows.bounds.items()}


def summarise(
    statistics: TokenStatistics, keep: torch.Tensor, config: SelectionConfig, group: Group
) -> dict[str, float]:
    """Figures of the whole batch, the same on every rank: counts, and shares that tell when scores mean little."""
    counts = torch.stack(
        [
            torch.tensor(keep.numel(), device=keep.device),
            keep.sum(),
            (statistics.C < LOW_COMPATIBILITY).sum(),
            (statistics.D < LOW_DIVERGENCE).sum(),
            (statistics.rank_in_teacher < min(TEACHER_TOP, config.support_k)).sum(),
        ]
    )
    num_valid, num_kept, low_c, low_d, in_top = all_reduce_sum(counts, group).tolist()
    valid = max(num_valid, 1)
    return {
        "num_valid": float(num_valid),
        "num_kept": float(num_kept),
        "keep_ratio": num_kept / valid,
        "low_C_share": low_c / valid,
        "low_D_share": low_d / valid,
        "teacher_top5_share": in_top / valid,
    }


def keep_budget(keep_ratio: float, num_valid: int) -> int:
    """ceil(ratio x rows), with the ratio taken as the decimal that was written (0.07 x 100 is 7)."""
    return math.ceil(Fraction(repr(float(keep_ratio))) * num_valid)


def lowest(values: torch.Tensor, group: Group) -> float:
    """Lowest value on any rank; NaN where there is none."""
    least = torch.full((1,), torch.inf, dtype=torch.float64, device=values.device)
    least = torch.cat([least, values.double()]).amin()
    if group_size(group) > 1:
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=group)
    return float(least) if math.isfinite(least) else math.nan
