"""Attention over a sequence that is shared by context-parallel ranks, and over packed sequences.

With C context-parallel ranks Megatron cuts a sequence into 2·C chunks and gives rank r chunks r and 2·C-1-r, so that
causal attention costs every rank the same. Packed sequences lie end to end along S with a batch of one ("thd");
each is cut like this by itself.

S tokens of this rank, B batch, A query heads and G key-value heads of this rank, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_taopd.ops.context import context_positions


def context_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, group: dist.ProcessGroup, scale: float | None
) -> torch.Tensor:
    """Causal attention of this rank's queries [S, B, A, D] to the keys and values [S, B, G, D] of all ranks.

    Every rank gathers all keys and values; their gradients are summed where they came from.

    Returns:
        [S, B, A*D].
    """
    size, length = group.size(), query.shape[0] * group.size()
    places = [context_positions(length, rank=rank, size=size, device=query.device) for rank in range(size)]
    visible = torch.cat(places)[None, :] <= places[group.rank()][:, None]
    context = _attend(query, _gather(key, group), _gather(value, group), visible, scale)
    return context.reshape(*query.shape[:2], -1)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: Any,
    *,
    group: dist.ProcessGroup | None,
    scale: float | None,
) -> torch.Tensor:
    """Causal attention inside each of several packed sequences, sequence by sequence.

    Args:
        query: [S, A, D].
        key: [S, G, D], as ``value``.
        packed: Megatron's ``PackedSeqParams``, "thd"; its ``cu_seqlens_q`` (those with padding where they are given)
            count the tokens of all context-parallel ranks and end at S times their number.
        group: the context-parallel ranks; None stands for one.

    Returns:
        [S, A*D].
    """
    size = 1 if group is None else group.size()
    ends = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    bounds = ends.tolist()
    if bounds[0] != 0 or bounds[-1] != query.shape[0] * size:
        raise ValueError(f"packed sequences end at {bounds[-1]} of {query.shape[0] * size} tokens")
    if group is not None and size > 1:
        # [C, S, G, D]: a sequence of n tokens has n / C of them on each rank.
        keys, values = (_gather(part, group).unflatten(0, (size, -1)) for part in (key, value))
    parts = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        own = slice(start // size, stop // size)
        if group is None or size == 1:
            part = _attend(query[own, None], key[own, None], value[own, None], None, scale)
        else:
            places = [
                context_positions(stop - start, rank=rank, size=size, device=query.device) for rank in range(size)
            ]
            visible = torch.cat(places)[None, :] <= places[group.rank()][:, None]
            key_of_all, value_of_all = (whole[:, own].flatten(0, 1)[:, None] for whole in (keys, values))
            part = _attend(query[own, None], key_of_all, value_of_all, visible, scale)
        parts.append(part[:, 0])
    return torch.cat(parts).flatten(1)


def _gather(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Rank by rank along the first dimension; the backward reduce-scatters."""
    return gather_from_sequence_parallel_region(part.contiguous(), group=group)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """[S, B, A, D], [K, B, G, D] twice -> [S, B, A, D]; ``visible`` [S, K], None for causal with S = K."""
    context = torch.nn.functional.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=visible,
        is_causal=visible is None and query.shape[0] > 1,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return context.permute(2, 0, 1, 3)
