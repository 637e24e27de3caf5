"""Pick rows of hidden states for the LM head, under sequence parallelism too.

Shapes: S sequence (S/ranks under sequence parallelism), B batch, H hidden size, R rows.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_taopd.ops.collectives import Group, all_gather, all_reduce_sum, group_rank, group_size


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
        ctx.shape, ctx.group = hidden_SBH.shape, group
        rows_RH = hidden_SBH.reshape(num_local, -1)
        if not sequence_parallel:
            ctx.save_for_backward(row_index_R, torch.ones_like(row_index_R, dtype=torch.bool))
            return rows_RH[row_index_R]
        owner_R = row_index_R // num_local
        mine_R = owner_R == group_rank(group)
        index_R = (row_index_R - group_rank(group) * num_local).where(mine_R, 0)
        ctx.save_for_backward(index_R, mine_R)
        return _collect(rows_RH, index_R, mine_R, owner_R, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        index, mine = ctx.saved_tensors
        grad_RH = all_reduce_sum(grads[0].clone(), ctx.group).masked_fill(~mine[:, None], 0.0)
        steps, batch, hidden = ctx.shape
        grad = grad_RH.new_zeros(steps * batch, hidden).index_add_(0, index, grad_RH)
        return grad.view(ctx.shape), None, None, None


def _collect(
    rows_RH: torch.Tensor, index_R: torch.Tensor, mine_R: torch.Tensor, owner_R: torch.Tensor, group: Group
) -> torch.Tensor:
    """All wanted rows [R, H] on every rank, by whichever collective moves less."""
    ranks, num_rows = group_size(group), index_R.numel()
    count_P = torch.bincount(owner_R, minlength=ranks)
    most = int(count_P.max())
    if ranks * most > 2 * num_rows:
        # Most rows are one rank's: a sum moves 2 R rows a rank, a gather (ranks x most).
        return all_reduce_sum(rows_RH[index_R].masked_fill(~mine_R[:, None], 0.0), group)
    own_RH = rows_RH.new_zeros(most, rows_RH.shape[1])
    own_RH[: int(mine_R.sum())] = rows_RH[index_R[mine_R]]
    by_owner = owner_R.argsort(stable=True)
    place_R = torch.empty_like(by_owner)
    place_R[by_owner] = torch.arange(num_rows, device=place_R.device) - (count_P.cumsum(0) - count_P)[owner_R[by_owner]]
    return all_gather(own_RH, group)[owner_R, place_R]


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
