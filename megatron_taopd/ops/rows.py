"""Pick rows of hidden states for the LM head, under sequence parallelism too.

Shapes: S sequence (S/ranks under sequence parallelism), B batch, H hidden size, R rows.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_taopd.ops.collectives import Group, all_reduce_sum, group_rank, group_size


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SBH: torch.Tensor,
        row_index_R: torch.Tensor,
        group: Group,
        sequence_parallel: bool,
    ) -> torch.Tensor:
        num_local = hidden_SBH.shape[0] * hidden_SBH.shape[1]
        index = row_index_R - (group_rank(group) * num_local if sequence_parallel else 0)
        ctx.shape, ctx.group = hidden_SBH.shape, group
        rows_RH = hidden_SBH.reshape(num_local, -1)
        if not sequence_parallel:
            ctx.save_for_backward(index, torch.ones_like(index, dtype=torch.bool))
            return rows_RH[index]
        mine = (index >= 0) & (index < num_local)
        ctx.save_for_backward(index.clamp(0, num_local - 1), mine)
        own_RH = rows_RH[index.clamp(0, num_local - 1)].masked_fill(~mine[:, None], 0.0)
        return all_reduce_sum(own_RH, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        index, mine = ctx.saved_tensors
        grad_RH = all_reduce_sum(grads[0].clone(), ctx.group).masked_fill(~mine[:, None], 0.0)
        steps, batch, hidden = ctx.shape
        grad = grad_RH.new_zeros(steps * batch, hidden).index_add_(0, index, grad_RH)
        return grad.view(ctx.shape), None, None, None


def gather_rows(
    hidden_SBH: torch.Tensor, row_index_R: torch.Tensor, *, group: Group, sequence_parallel: bool
) -> torch.Tensor:
    """Rows of the flattened [S * B, H] hidden states, replicated over the tensor-parallel group.

    Args:
        hidden_SBH: hidden states; under sequence parallelism this rank's slice of the sequence.
        row_index_R: int64 rows (sequence position * B + batch index) of the *full* sequence, the same on all
            ranks.
        group: the tensor-parallel ranks.
        sequence_parallel: whether S is cut over the group; then only the wanted rows travel.

    Returns:
        [R, H]. Its gradient is taken as partial over the group (each rank's share of the vocabulary) and
        summed before it flows on, so that use it for nothing but a vocab-parallel head.
    """
    return _GatherRows.apply(hidden_SBH, row_index_R, group, sequence_parallel and group_size(group) > 1)
