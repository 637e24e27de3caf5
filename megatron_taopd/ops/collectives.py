"""Collectives that autograd may pass, each with the backward that its place in the graph needs.

A replicated value is the same on all ranks of the group, a sharded one differs. ``sum_over_shards`` leads
from sharded to replicated, ``enter_shards`` from replicated to sharded. A loss that is replicated at its end
and crosses between the two only through these has the right gradient on every rank. ``group=None`` means one
rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed import ProcessGroup

Group = ProcessGroup | None


def group_size(group: Group) -> int:
    """Ranks in the group."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """This rank's place in the group."""
    return 0 if group is None else group.rank()


def all_reduce_sum(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum over the group without autograd; may overwrite ``tensor``. All ranks pass the same shape."""
    if group_size(group) > 1 and tensor.numel():
        tensor = tensor.contiguous()
        torch.distributed.all_reduce(tensor, group=group)
    return tensor


def all_gather(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """Stack every rank's tensor: [...] to [ranks, ...], without autograd. All ranks pass the same shape."""
    if group_size(group) == 1 or not tensor.numel():
        return tensor.unsqueeze(0).expand(group_size(group), *tensor.shape)
    out = tensor.new_empty(group_size(group), *tensor.shape)
    torch.distributed.all_gather(list(out.unbind(0)), tensor.contiguous(), group=group)
    return out


def all_to_all_rows(rows_RH: torch.Tensor, counts: Sequence[int], group: Group) -> torch.Tensor:
    """Send each rank its part of the rows, which lie in rank order, without autograd.

    Args:
        counts: rows for each rank, the same on all ranks.

    Returns:
        [ranks, own count, H]: what every rank had for this one.
    """
    ranks, own = group_size(group), counts[group_rank(group)]
    out = rows_RH.new_empty(ranks, own, rows_RH.shape[1])
    if rows_RH.numel():
        torch.distributed.all_to_all_single(
            out.flatten(0, 1), rows_RH.contiguous(), [own] * ranks, list(counts), group=group
        )
    return out


class _SumOverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        return all_reduce_sum(tensor.clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class _EnterShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce_sum(grads[0].clone(), ctx.group), None


def sum_over_shards(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """SUM all-reduce whose backward is the identity: what follows must be replicated."""
    if group_size(group) == 1:
        return tensor
    return _SumOverShards.apply(tensor, group)


def enter_shards(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The same value, with its gradient summed over the group: from replicated to what is sharded.

    All ranks run this backward together, or none.
    """
    if group_size(group) == 1:
        return tensor
    return _EnterShards.apply(tensor, group)
