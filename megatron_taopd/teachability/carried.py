"""Selection without a view of the batch: quantiles and cut are carried from earlier steps.

Each step leaves a moving average behind: of every quantile that the selector asks for, in the order in which it asks,
and of the place where the budget cuts the ranking. The next step's rows are scored and kept or not one by one, so
that this can happen inside the training forward. Shapes: R rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from megatron_taopd.errors import ConfigError
from megatron_taopd.ops.collectives import Group, all_reduce_sum
from megatron_taopd.ops.order import descending_key, distributed_quantiles, first_n
from megatron_taopd.teachability.config import SelectionConfig
from megatron_taopd.teachability.hashing import uniform_hash
from megatron_taopd.teachability.ranking import RankedRows, first_in_sample, rank_rows
from megatron_taopd.teachability.selection import Selection, bounds_in_use, keep_budget, lowest, select, summarise
from megatron_taopd.teachability.statistics import TokenStatistics

CROWDED_SCORES = (-1, 0, 1)


@dataclass(frozen=True, kw_only=True)
class CarriedEstimate:
    """What is carried; plain values, the same on every rank."""

    quantiles: list[list[list[float]]]
    """Answers to the selector's questions, in the order of asking; the first holds the bounds of D, C and H."""
    cut: float
    """Rows whose :func:`cut_value` is above it are kept."""
    cut_share: float
    """Share of the rows exactly at the cut that is kept."""

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)


@torch.no_grad()
def update_estimate(
    before: CarriedEstimate | None,
    statistics: TokenStatistics,
    *,
    sample_index_R: torch.Tensor,
    position_R: torch.Tensor,
    config: SelectionConfig,
    group: Group,
    seed: int,
    step: int,
) -> CarriedEstimate:
    """Move the estimate towards a batch of which all statistics are known. All ranks of the group call it.

    The batch's own quantiles are exact over the group and no row travels. The cut is that of this batch's budget among
    its rows as the moved quantiles score them, which is what the next step will do.

    Args:
        before: None takes the figures of the batch as they are.
        group: ranks that hold different rows.
    """
    decay = config.resolved_carried_decay
    moving = _MovingQuantiles(None if before is None else before.quantiles, decay, group)
    rows = rank_rows(
        statistics,
        sample_index_R=sample_index_R,
        position_R=position_R,
        config=config,
        quantiles=moving,
        seed=seed,
        step=step,
    )
    num_valid = int(all_reduce_sum(torch.tensor(len(statistics), device=statistics.D.device), group))
    value = cut_value(rows)
    budget = keep_budget(config.resolved_keep_ratio, num_valid)
    within = first_n([descending_key(value), sample_index_R, position_R], budget, group)
    cut = lowest(value[within], group)
    above, at = all_reduce_sum(torch.stack([(value > cut).sum(), (value == cut).sum()]), group).tolist()
    share = (budget - above) / at if at else math.nan
    if before is not None:
        cut = _move(before.cut, cut, decay)
        share = _move(before.cut_share, share, decay)
    return CarriedEstimate(quantiles=moving.answers, cut=cut, cut_share=share)


@torch.no_grad()
def keep_by_estimate(
    estimate: CarriedEstimate,
    statistics: TokenStatistics,
    *,
    sample_index_R: torch.Tensor,
    position_R: torch.Tensor,
    config: SelectionConfig,
    sample_group: Group = None,
    seed: int,
    step: int,
) -> tuple[RankedRows, torch.Tensor]:
    """Scores and keep mask [R] of some whole responses, each row judged on its own.

    Rows at the very cut are kept by a hash of their place. Then each response adds its own best rows until it has
    ``min_keep_per_sample``.

    Args:
        sample_group: ranks that hold rows of the same responses; they call it together. None: one rank has them all.
    """
    rows = rank_rows(
        statistics,
        sample_index_R=sample_index_R,
        position_R=position_R,
        config=config,
        quantiles=_RememberedQuantiles(estimate.quantiles),
        seed=seed,
        step=step,
    )
    value = cut_value(rows)
    lucky = uniform_hash(seed, step, sample_index_R, position_R) < estimate.cut_share
    keep = (value > estimate.cut) | ((value == estimate.cut) & lucky)
    return rows, keep | first_in_sample(rows.order_keys, sample_index_R, config.resolved_min_keep, sample_group)


@torch.no_grad()
def keep_without_statistics(
    sample_index_R: torch.Tensor,
    position_R: torch.Tensor,
    *,
    config: SelectionConfig,
    group: Group,
    sample_group: Group = None,
    seed: int,
    step: int,
) -> torch.Tensor:
    """Exact keep mask [R] over the batch for a selector that reads the rows' places alone (``full``, ``prefix``,
    ``random``): it needs no forward pass, and nothing has to be carried."""
    blank = {
        name: torch.zeros_like(sample_index_R, dtype=torch.float32) for name in TokenStatistics.__dataclass_fields__
    }
    return select(
        TokenStatistics(**blank),
        sample_index_R=sample_index_R,
        position_R=position_R,
        config=config,
        group=group,
        sample_group=sample_group,
        seed=seed,
        step=step,
    ).keep


@torch.no_grad()
def select_by_estimate(
    estimate: CarriedEstimate,
    statistics: TokenStatistics,
    *,
    sample_index_R: torch.Tensor,
    position_R: torch.Tensor,
    config: SelectionConfig,
    group: Group,
    sample_group: Group = None,
    seed: int,
    step: int,
) -> Selection:
    """:func:`keep_by_estimate` over all rows, with the figures of the whole batch. All ranks of the group call it."""
    rows, keep = keep_by_estimate(
        estimate,
        statistics,
        sample_index_R=sample_index_R,
        position_R=position_R,
        config=config,
        sample_group=sample_group,
        seed=seed,
        step=step,
    )
    return Selection(
        D_norm=rows.D_norm,
        C_norm=rows.C_norm,
        H_norm=rows.H_norm,
        score=rows.score,
        keep=keep,
        summary={
            "carried_cut": estimate.cut,
            **{f"carried_{name}": value for name, value in bounds_in_use(rows).items()},
            **summarise(statistics, keep, config, group),
        },
    )


def cut_value(rows: RankedRows) -> torch.Tensor:
    """One number a row [R] that orders rows by score, then by the tie-break, and can be averaged over steps.

    Scores in (0, 1) are themselves. Clipping puts whole shares of the rows at exactly 0 and exactly 1 (and
    ``q3_teachability`` all rows outside its quadrant at -1), where a cut on the score alone would keep far too many
    rows or too few. Each of these points is drawn out to an interval of length 1 along which the tie-break runs: 1 to
    [1, 2], 0 to [-1, 0].
    """
    score = rows.score
    value = score - 2
    for point in CROWDED_SCORES:
        value = value + (score > point).double()
        if rows.lead is not None:
            along = 0.5 + torch.atan(rows.lead) / torch.pi  # any increasing map onto [0, 1]
            value = torch.where(score == point, value + along, value)
    return value


class _MovingQuantiles:
    """Exact quantiles of the batch, averaged with those carried; keeps what it answers."""

    def __init__(self, before: list[list[list[float]]] | None, decay: float, group: Group) -> None:
        self.before = before
        self.decay = decay
        self.exact = partial(distributed_quantiles, group=group)
        self.answers: list[list[list[float]]] = []

    def __call__(self, columns: Sequence[torch.Tensor], qs: Sequence[float]) -> list[list[float]]:
        answer = self.exact(columns, qs)
        if self.before is not None:
            carried = _nth_answer(self.before, len(self.answers), len(columns), len(qs))
            answer = [
                [_move(old, new, self.decay) for old, new in zip(olds, news, strict=True)]
                for olds, news in zip(carried, answer, strict=True)
            ]
        self.answers.append(answer)
        return answer


class _RememberedQuantiles:
    """The carried quantiles, whatever the rows at hand."""

    def __init__(self, answers: list[list[list[float]]]) -> None:
        self.answers = answers
        self.asked = 0

    def __call__(self, columns: Sequence[torch.Tensor], qs: Sequence[float]) -> list[list[float]]:
        self.asked += 1
        return _nth_answer(self.answers, self.asked - 1, len(columns), len(qs))


def _nth_answer(answers: list[list[list[float]]], n: int, columns: int, qs: int) -> list[list[float]]:
    if n < len(answers) and len(answers[n]) == columns and len(answers[n][0]) == qs:
        return answers[n]
    raise ConfigError(
        f"the selector's quantile question {n + 1} is not among the {len(answers)} of the steps before: with "
        "--selection-scope carried a selector must ask for the same quantiles in the same order at every step; use "
        "--selection-scope global"
    )


def _move(old: float, new: float, decay: float) -> float:
    """Moving average; NaN says that a batch had nothing to tell."""
    if math.isnan(new):
        return old
    return new if math.isnan(old) else new + decay * (old - new)
