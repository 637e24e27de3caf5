"""Weights of positions whose response was sampled by another policy than the student (docs/method.md has the maths).

R rows that this rank predicts of a micro-batch.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.losses.config import ImportanceRatio
from megatron_taopd.ops.collectives import Group, group_size


def importance_weights(
    kind: ImportanceRatio,
    new_logprob_R: torch.Tensor,
    micro_batch: MicroBatch,
    *,
    clip: float,
    group: Group = None,
) -> torch.Tensor:
    """min(clip, ratio of the student's to the sampling policy's probability), float64 [R], without gradient.

    Args:
        kind: ``token``: of the position's own token; ``prefix``: of all tokens of the response before it.
        new_logprob_R: log p of the sampled tokens under the student as it is, at the sampling temperature.
        micro_batch: with the log-probabilities of the sampling policy.
        group: context-parallel ranks, which hold other positions of the same responses and call it together.
    """
    assert micro_batch.rollout_logprobs_R is not None, "open_source refuses responses without log-probabilities"
    log_ratio_R = new_logprob_R.detach().double() - micro_batch.rollout_logprobs_R.double()
    if kind == "prefix":
        log_ratio_R = _sum_before(log_ratio_R, micro_batch.sample_index_R, micro_batch.position_R, group)
    return log_ratio_R.clamp(max=math.log(clip)).exp()


def _sum_before(
    values_R: torch.Tensor, sample_index_R: torch.Tensor, position_R: torch.Tensor, group: Group
) -> torch.Tensor:
    """Of each row the sum over the earlier positions of its response."""
    ends = torch.zeros(3, dtype=torch.int64, device=values_R.device)  # largest -index, index, position + 1
    ends[0] = -(2**62)
    if values_R.numel():
        ends = torch.stack([-sample_index_R.min(), sample_index_R.max(), position_R.max() + 1])
    if group_size(group) > 1:
        dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=group)
    first, last, length = -int(ends[0]), int(ends[1]), int(ends[2])
    if length == 0:
        return values_R
    table_BT = values_R.new_zeros(last - first + 1, length)
    place = (sample_index_R - first, position_R)
    table_BT[place] = values_R
    if group_size(group) > 1:
        dist.all_reduce(table_BT, group=group)  # each place has one rank's value
    return (table_BT.cumsum(1) - table_BT)[place]
