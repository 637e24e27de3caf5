"""Pick rows of hidden states for the LM head, under sequence parallelism too.

Shapes: S sequence (S/ranks under sequence parallelism), B batch, H hidden size, R rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from megatron_taopd.ops.collectives import (
    Group,
    all_gather,
    all_reduce_sum,
    all_to_all_rows,
    group_rank,
    group_size,
)


class _Owners(NamedTuple):
    """Whose the wanted rows are under sequence parallelism; the same on every rank."""

    owner_R: torch.Tensor
    by_owner_R: torch.Tensor
    """Rows in order of their owners."""
    counts: list[int]
    """Rows of each rank."""

    @classmethod
    def of(cls, owner_R: torch.Tensor, ranks: int) -> _Owners:
        """Reads the counts once."""
        return cls(owner_R, owner_R.argsort(stable=True), torch.bincount(owner_R, minlength=ranks).tolist())

    @property
    def are_uneven(self) -> bool:
        """Most rows are so few ranks' that a sum over all ranks, which moves 2 R rows a rank, is less than what the
        fullest rank sends or gets by itself, ranks x most."""
        return len(self.counts) * max(self.counts) > 2 * self.owner_R.numel()


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
            ctx.owners = None
            ctx.save_for_backward(row_index_R)
            return rows_RH[row_index_R]
        owners = _Owners.of(row_index_R // num_local, group_size(group))
        start = sum(owners.counts[: group_rank(group)])
        mine_L = owners.by_owner_R[start : start + owners.counts[group_rank(group)]]
        index_L = row_index_R[mine_L] - group_rank(group) * num_local
        ctx.owners, ctx.mine_L = owners, mine_L
        ctx.save_for_backward(index_L)
        return _collect(rows_RH[index_L], mine_L, owners, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (index_L,) = ctx.saved_tensors
        if ctx.owners is None:
            grad_LH = all_reduce_sum(grads[0].clone(), ctx.group)
        else:
            grad_LH = _sum_for_owners(grads[0], ctx.mine_L, ctx.owners, ctx.group)
        steps, batch, hidden = ctx.shape
        grad = grad_LH.new_zeros(steps * batch, hidden).index_add_(0, index_L, grad_LH)
        return grad.view(ctx.shape), None, None, None


def _collect(own_LH: torch.Tensor, mine_L: torch.Tensor, owners: _Owners, group: Group) -> torch.Tensor:
    """All wanted rows [R, H] on every rank from each rank's own, by whichever collective moves less."""
    counts, num_rows = owners.counts, owners.owner_R.numel()
    if owners.are_uneven:
        rows_RH = own_LH.new_zeros(num_rows, own_LH.shape[1])
        rows_RH[mine_L] = own_LH
        return all_reduce_sum(rows_RH, group)
    padded_LH = own_LH.new_zeros(max(counts), own_LH.shape[1])
    padded_LH[: own_LH.shape[0]] = own_LH
    parts = zip(all_gather(padded_LH, group), counts, strict=True)
    rows_RH = own_LH.new_empty(num_rows, own_LH.shape[1])
    rows_RH[owners.by_owner_R] = torch.cat([part_LH[:count] for part_LH, count in parts])
    return rows_RH


def _sum_for_owners(grad_RH: torch.Tensor, mine_L: torch.Tensor, owners: _Owners, group: Group) -> torch.Tensor:
    """Gradients of this rank's own rows [L, H], summed over the ranks, by whichever collective moves less.

    An all-to-all moves what a reduce-scatter does, with no padding where ranks have different numbers of rows, and
    over gloo half of what gloo's reduce-scatter does, which is an all-reduce.
    """
    if owners.are_uneven:
        return all_reduce_sum(grad_RH.clone(), group)[mine_L]
    received_PLH = all_to_all_rows(grad_RH[owners.by_owner_R], owners.counts, group)
    return received_PLH.sum(0)


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
        summed before it flows on (under sequence parallelism on the rank that has the row alone), so that use it for
        nothing but a vocab-parallel head.
    """
    return _GatherRows.apply(hidden_SBH, row_index_R, group, sequence_parallel and group_size(group) > 1)
