"""Rows in the order in which a selector keeps them, from statistics and the quantiles that scale them.

Shapes: R rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_taopd.ops.collectives import Group, all_gather, group_rank, group_size
from megatron_taopd.ops.order import descending_key
from megatron_taopd.registry import resolve
from megatron_taopd.teachability.config import SelectionConfig
from megatron_taopd.teachability.scores import HIGH, LOW, normalise
from megatron_taopd.teachability.selectors import SELECTORS, ScoredPositions
from megatron_taopd.teachability.statistics import TokenStatistics

Quantiles = Callable[[Sequence[torch.Tensor], Sequence[float]], list[list[float]]]
"""``quantiles(columns, qs)``: for each column its quantiles; of the batch at hand, or remembered ones."""


@dataclass(kw_only=True)
class RankedRows:
    """What a selector made of R rows; float64."""

    D_norm: torch.Tensor
    C_norm: torch.Tensor
    H_norm: torch.Tensor
    score: torch.Tensor
    lead: torch.Tensor | None
    """Breaks ties of the score, higher first and -inf where it is not finite; None: nothing does."""
    order_keys: list[torch.Tensor]
    """int64, most important first, lower is kept first; together they tell all rows of all ranks apart."""
    bounds: dict[str, list[float]]
    """5 % and 95 % quantile by which D, C and H were scaled."""


def rank_rows(
    statistics: TokenStatistics,
    *,
    sample_index_R: torch.Tensor,
    position_R: torch.Tensor,
    config: SelectionConfig,
    quantiles: Quantiles,
    seed: int,
    step: int,
) -> RankedRows:
    """Score rows with the configured selector.

    Args:
        quantiles: asked first for the bounds of D, C and H, then for whatever the selector itself wants.
    """
    entropy = statistics.H if config.entropy_support == "full" else statistics.H_topk
    upstream = config.support_mode == "upstream"
    raw = {"D": statistics.D, "C": statistics.C, "H": entropy}
    bounds = dict(zip(raw, quantiles(list(raw.values()), (LOW, HIGH)), strict=True))
    norm = {name: normalise(values, *bounds[name]) for name, values in raw.items()}
    ranking = resolve("selector", config.selector, SELECTORS)(
        ScoredPositions(
            statistics=statistics,
            D_norm=norm["D"],
            C_norm=norm["C"],
            C_scale=_mass(statistics.C) if config.compatibility_scale == "raw" else norm["C"],
            H_norm=norm["H"],
            H_raw=entropy,
            sample_index=sample_index_R,
            position=position_R,
            upstream=upstream,
            seed=seed,
            step=step,
            normalise=lambda x: normalise(x, *quantiles([x], (LOW, HIGH))[0]),
            median=lambda x: quantiles([x], (0.5,))[0][0],
        )
    )
    score = ranking.score.double()
    if upstream:  # the released code goes by position alone
        lead: torch.Tensor | None = -position_R.double()
    elif ranking.lead is None:
        lead = None
    else:
        lead = ranking.lead.double()
        lead = lead.where(lead.isfinite(), -torch.inf)
    ties = [] if lead is None else [descending_key(lead)]
    return RankedRows(
        D_norm=norm["D"],
        C_norm=norm["C"],
        H_norm=norm["H"],
        score=score,
        lead=lead,
        order_keys=[descending_key(score), *ties, sample_index_R, position_R],
        bounds=bounds,
    )


def place_in_sample(order_keys: list[torch.Tensor], sample_index_R: torch.Tensor) -> torch.Tensor:
    """Each row's place from 0 among the rows of its own response, best first."""
    order = torch.arange(sample_index_R.numel(), device=sample_index_R.device)
    for key in [*reversed(order_keys), sample_index_R]:
        order = order[key[order].argsort(stable=True)]
    ordered = sample_index_R[order]
    place = torch.arange(ordered.numel(), device=ordered.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(place).scatter_(0, order, place)


def first_in_sample(order_keys: list[torch.Tensor], sample_index_R: torch.Tensor, n: int, group: Group) -> torch.Tensor:
    """Mask [R] of the n best rows of every response, whose rows may be spread over the ranks of ``group``.

    Only the rows that are among the first n on their own rank travel: the first n of all are among them.
    """
    candidates = place_in_sample(order_keys, sample_index_R) < n
    if group_size(group) == 1:
        return candidates
    keys = torch.stack([sample_index_R, *order_keys])[:, candidates]  # [1 + keys, candidates]
    counts = all_gather(torch.tensor(keys.shape[1], device=keys.device), group).tolist()
    padded = keys.new_zeros(keys.shape[0], max(counts))
    padded[:, : keys.shape[1]] = keys
    parts = [part[:, :count] for part, count in zip(all_gather(padded, group), counts, strict=True)]
    sample_index, *others = torch.cat(parts, dim=1).unbind(0)
    first = (place_in_sample(others, sample_index) < n).split(counts)[group_rank(group)]
    return candidates.masked_scatter(candidates, first)


def _mass(c: torch.Tensor) -> torch.Tensor:
    return c.double().where(c.isfinite(), 0.0)
