"""Generation under context parallelism: its ranks hold the same weights, so each answers a share of the prompts."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_taopd.data.records import Rollout
from megatron_taopd.ops.collectives import all_gather
from megatron_taopd.platform import device, distributed


def context_share(count: int) -> slice:
    """The contiguous share of ``count`` prompts of a replica that this context-parallel rank answers; may be empty."""
    size, rank = distributed.context_parallel_size(), distributed.context_parallel_rank()
    return slice(count * rank // size, count * (rank + 1) // size)


def join_shares(share: list[Rollout], *, with_hidden: bool, hidden_size: int, dtype: torch.dtype) -> list[Rollout]:
    """All responses of the replica, in order, on each of its context-parallel ranks, which call it together.

    Args:
        with_hidden: the responses carry the hidden states that predicted them (on last-stage ranks).
        hidden_size: of these.
        dtype: of these.
    """
    group = distributed.context_parallel_group()
    if group.size() == 1:
        return share
    own = [rollout.hidden_TH for rollout in share if rollout.hidden_TH is not None]
    for rollout in share:
        rollout.hidden_TH = None
    parts: list[list[Rollout]] = [[] for _ in range(group.size())]
    dist.all_gather_object(parts, share, group=group)
    if with_hidden and distributed.is_last_stage():
        rows = [sum(len(r.response_tokens) for r in part) for part in parts]
        padded = torch.zeros(max(rows), hidden_size, dtype=dtype, device=device())
        padded[: rows[group.rank()]] = torch.cat([*own, padded[:0]])
        for part, hidden_TH in zip(parts, all_gather(padded, group), strict=True):
            lengths = [len(r.response_tokens) for r in part]
            for rollout, kept_TH in zip(part, hidden_TH[: sum(lengths)].split(lengths), strict=True):
                rollout.hidden_TH = kept_TH
    return [rollout for part in parts for rollout in part]
