"""How far the kept positions are those that other selectors would keep of the same batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_taopd.ops.collectives import Group, all_reduce_sum
from megatron_taopd.teachability.config import SelectionConfig
from megatron_taopd.teachability.selection import select
from megatron_taopd.teachability.statistics import TokenStatistics


@torch.no_grad()
def overlaps(
    statistics: TokenStatistics,
    keep_R: torch.Tensor,
    selectors: Sequence[str],
    *,
    sample_index_R: torch.Tensor,
    position_R: torch.Tensor,
    config: SelectionConfig,
    group: Group = None,
    sample_group: Group = None,
    seed: int = 0,
    step: int = 0,
) -> dict[str, float]:
    """:func:`agreement` of the kept rows with what each selector would keep. All ranks of the group call it.

    Args:
        keep_R: bool; what was kept.
        config: of the step; the others have its budget, over the whole batch whatever its scope.
        group, sample_group, seed, step: as in :func:`select`.
    """
    answers = {}
    for name in selectors:
        other = select(
            statistics,
            sample_index_R=sample_index_R,
            position_R=position_R,
            config=config.with_selector(name),
            group=group,
            sample_group=sample_group,
            seed=seed,
            step=step,
        )
        answers[name] = agreement(keep_R, other.keep, group)
    return answers


@torch.no_grad()
def agreement(keep: torch.Tensor, other: torch.Tensor, group: Group) -> float:
    """Rows that two masks [R] both keep over the mean number that they keep, on all ranks; 1 where neither keeps
    any."""
    counts = torch.stack([(keep & other).sum(), keep.sum() + other.sum()])
    both, either = all_reduce_sum(counts, group).tolist()
    return 2 * both / either if either else 1.0
