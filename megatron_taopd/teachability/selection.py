"""Choose the kept positions of a rollout batch whose rows are spread over data-parallel ranks.

The mask depends on the batch alone: not on how its responses are spread over ranks or micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch

from megatron_taopd.ops.collectives import Group, all_reduce_sum, group_size
from megatron_taopd.ops.order import descending_key, distributed_quantiles, first_n
from megatron_taopd.registry import resolve
from megatron_taopd.teachability.config import SelectionConfig
from megatron_taopd.teachability.scores import HIGH, LOW, normalise
from megatron_taopd.teachability.selectors import SELECTORS, Ranking, ScoredPositions
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
    0.1 nats), teacher_top5_share (response tokens among the teacher's best five)."""


@torch.no_grad()
def select(
    statistics: TokenStatistics,
    *,
    sample_index_R: torch.Tensor,
    position_R: torch.Tensor,
    config: SelectionConfig,
    group: Group = None,
    seed: int = 0,
    step: int = 0,
) -> Selection:
    """Scores of all rows and the mask of those that are kept. All ranks of the group call it.

    ceil(ratio x valid rows of all ranks) rows with the highest score are kept; equal scores are told apart by
    the selector's raw leading quantity, then by sample and position (upstream mode: by position, then
    sample). Then every response adds its own best rows until it has ``min_keep_per_sample``.

    Args:
        statistics: of this rank's valid response positions; their number may differ between ranks, and be 0.
        sample_index_R: int64 index of the response in the whole batch; a response lives on one rank.
        position_R: int64 position in the response.
        group: ranks that hold different rows; None means that all rows are here.
        seed, step: of the ``random`` selector.
    """
    entropy = statistics.H if config.entropy_support == "full" else statistics.H_topk
    raw = {"D": statistics.D, "C": statistics.C, "H": entropy}
    bounds = dict(zip(raw, distributed_quantiles(list(raw.values()), (LOW, HIGH), group), strict=True))
    norm = {name: normalise(values, *bounds[name]) for name, values in raw.items()}
    ranking: Ranking = resolve("selector", config.selector, SELECTORS)(
        ScoredPositions(
            statistics=statistics,
            D_norm=norm["D"],
            C_norm=norm["C"],
            C_scale=_mass(statistics.C) if config.compatibility_scale == "raw" else norm["C"],
            H_norm=norm["H"],
            H_raw=entropy,
            sample_index=sample_index_R,
            position=position_R,
            upstream=config.support_mode == "upstream",
            seed=seed,
            step=step,
            normalise=lambda x: normalise(x, *distributed_quantiles([x], (LOW, HIGH), group)[0]),
            median=lambda x: distributed_quantiles([x], (0.5,), group)[0][0],
        )
    )
    num_valid = int(all_reduce_sum(torch.tensor(len(statistics), device=statistics.D.device), group))
    budget = keep_budget(config.resolved_keep_ratio, num_valid)
    keys = _order_keys(ranking, sample_index_R, position_R, upstream=config.support_mode == "upstream")
    within_budget = first_n(keys, budget, group)
    keep = within_budget | (_place_in_sample(keys, sample_index_R) < config.resolved_min_keep)

    counts = torch.stack(
        [
            keep.sum(),
            (statistics.C < LOW_COMPATIBILITY).sum(),
            (statistics.D < LOW_DIVERGENCE).sum(),
            (statistics.rank_in_teacher < TEACHER_TOP).sum(),
        ]
    )
    num_kept, low_c, low_d, in_top = all_reduce_sum(counts, group).tolist()
    valid = max(num_valid, 1)
    summary = {
        "num_valid": float(num_valid),
        "num_budget": float(budget),
        "num_kept": float(num_kept),
        "keep_ratio": num_kept / valid,
        "threshold": _threshold(ranking.score, within_budget, group),
        **{f"{name}_q05": low for name, (low, _) in bounds.items()},
        **{f"{name}_q95": high for name, (_, high) in bounds.items()},
        "low_C_share": low_c / valid,
        "low_D_share": low_d / valid,
        "teacher_top5_share": in_top / valid,
    }
    return Selection(
        D_norm=norm["D"],
        C_norm=norm["C"],
        H_norm=norm["H"],
        score=ranking.score.double(),
        keep=keep,
        summary=summary,
    )


def keep_budget(keep_ratio: float, num_valid: int) -> int:
    """ceil(ratio x rows), with the ratio taken as the decimal that was written (0.07 x 100 is 7)."""
    return math.ceil(Fraction(repr(float(keep_ratio))) * num_valid)


def _mass(c: torch.Tensor) -> torch.Tensor:
    return c.double().where(c.isfinite(), 0.0)


def _order_keys(
    ranking: Ranking, sample_index_R: torch.Tensor, position_R: torch.Tensor, *, upstream: bool
) -> list[torch.Tensor]:
    """int64 keys, most important first, lower is better."""
    score = descending_key(ranking.score)
    if upstream:
        return [score, position_R, sample_index_R]
    if ranking.lead is None:
        return [score, sample_index_R, position_R]
    lead = ranking.lead.double()
    lead = lead.where(lead.isfinite(), -torch.inf)
    return [score, descending_key(lead), sample_index_R, position_R]


def _place_in_sample(keys: list[torch.Tensor], sample_index_R: torch.Tensor) -> torch.Tensor:
    """Each row's place from 0 among the rows of its own response, best first."""
    order = torch.arange(sample_index_R.numel(), device=sample_index_R.device)
    for key in [*reversed(keys), sample_index_R]:
        order = order[key[order].argsort(stable=True)]
    ordered = sample_index_R[order]
    place = torch.arange(ordered.numel(), device=ordered.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(place).scatter_(0, order, place)


def _threshold(score: torch.Tensor, within_budget: torch.Tensor, group: Group) -> float:
    """Lowest score within the budget on any rank; NaN without rows."""
    lowest = torch.full((1,), torch.inf, dtype=torch.float64, device=score.device)
    lowest = torch.cat([lowest, score.double()[within_budget]]).amin()
    if group_size(group) > 1:
        torch.distributed.all_reduce(lowest, op=torch.distributed.ReduceOp.MIN, group=group)
    return float(lowest) if math.isfinite(lowest) else math.nan
