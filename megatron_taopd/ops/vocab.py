"""Softmax quantities and top-K over a vocabulary that is cut over ranks.

Shapes: R rows, V ids of this rank (contiguous from ``vocab_start``; may be none), K ids a row. Results
without V are the same on every rank of ``group``. Everything but top-K is differentiable in the logits.
"""

from __future__ import annotations

import torch

from megatron_taopd.errors import ConfigError
from megatron_taopd.ops.candidates import best_of_row, order_best_first
from megatron_taopd.ops.collectives import Group, all_gather, enter_shards, group_size, sum_over_shards


def local_max(logits_RV: torch.Tensor) -> torch.Tensor:
    """Maximum over this rank's ids [R], detached; -inf where there is none."""
    if logits_RV.shape[-1] == 0:
        return logits_RV.new_full(logits_RV.shape[:-1], -torch.inf)
    return logits_RV.detach().amax(-1)


def global_max(logits_RV: torch.Tensor, group: Group) -> torch.Tensor:
    """Maximum over the whole vocabulary [R], detached."""
    maximum = local_max(logits_RV)
    if group_size(group) > 1 and maximum.numel():
        torch.distributed.all_reduce(maximum, op=torch.distributed.ReduceOp.MAX, group=group)
    return maximum


def log_sum_exp(logits_RV: torch.Tensor, group: Group) -> torch.Tensor:
    """Log of the sum of exponentials over the whole vocabulary [R]. The maximum is detached."""
    maximum = global_max(logits_RV, group)
    return sum_over_shards((logits_RV - maximum[:, None]).exp().sum(-1), group).log() + maximum


def log_probs(logits_RV: torch.Tensor, group: Group) -> torch.Tensor:
    """Log-probabilities of this rank's ids [R, V] under the softmax over the whole vocabulary (nats)."""
    return logits_RV - enter_shards(log_sum_exp(logits_RV, group), group)[:, None]


def entropy(logits_RV: torch.Tensor, group: Group) -> torch.Tensor:
    """Entropy of the softmax over the whole vocabulary [R] (nats)."""
    log_p = log_probs(logits_RV, group)
    return -sum_over_shards((log_p.exp() * log_p).sum(-1), group)


def gather_local(values_RV: torch.Tensor, ids_RK: torch.Tensor, vocab_start: int) -> torch.Tensor:
    """Values at those of the ids that live on this rank, 0 at the others [R, K]."""
    if values_RV.shape[-1] == 0:
        return values_RV.sum(-1, keepdim=True).expand(ids_RK.shape)  # zeros that autograd still knows
    index = ids_RK - vocab_start
    mine = (index >= 0) & (index < values_RV.shape[-1])
    return values_RV.gather(-1, index.clamp(0, values_RV.shape[-1] - 1)).where(mine, 0.0)


def gather_ids(values_RV: torch.Tensor, ids_RK: torch.Tensor, *, vocab_start: int, group: Group) -> torch.Tensor:
    """Values at global ids [R, K]."""
    return sum_over_shards(gather_local(values_RV, ids_RK, vocab_start), group)


def mark_ids(ids_RK: torch.Tensor, *, vocab_start: int, num_valid: int) -> torch.Tensor:
    """Which of this rank's ids are among each row's ids: bool [R, V]."""
    marked = torch.zeros(ids_RK.shape[0], num_valid + 1, dtype=torch.bool, device=ids_RK.device)
    index = ids_RK - vocab_start
    mine = (index >= 0) & (index < num_valid)
    # The extra column takes the ids of other ranks.
    return marked.scatter_(-1, index.where(mine, num_valid), True)[:, :num_valid]


def check_support_size(k: int, vocab_size: int) -> None:
    """Raises:
    ConfigError: K is not between 1 and the vocabulary size.
    """
    if not 1 <= k <= vocab_size:
        raise ConfigError(
            f"--support-k {k} must be between 1 and the vocabulary size {vocab_size}; 16 is the method's default"
        )


def top_k(
    logits_RV: torch.Tensor, k: int, *, vocab_start: int, vocab_size: int, group: Group
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K highest logits of the whole vocabulary, best first; equal logits in order of their ids.

    Each rank sends K candidates a row, so that traffic grows with ranks x K and not with the vocabulary.

    Returns:
        Values [R, K] and ids [R, K] (int64), detached.

    Raises:
        ConfigError: K is larger than the vocabulary.
    """
    check_support_size(k, vocab_size)
    candidates = all_gather(pack_best(logits_RV, k, vocab_start), group)
    return best_of_ranks(candidates, logits_RV.dtype)


def pack_best(logits_RV: torch.Tensor, k: int, vocab_start: int) -> torch.Tensor:
    """This rank's K best logits and their ids [R, 2K], detached.

    float64 holds both fp32 logits and ids exactly, which makes it one collective.
    """
    values_RK, ids_RK = best_of_row(logits_RV.detach(), k, vocab_start)
    return torch.cat([values_RK.double(), ids_RK.double()], dim=-1)


def best_of_ranks(packed_PRC: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The K best of what :func:`pack_best` packed on every rank: values of the logits' type and ids; [R, K]."""
    k = packed_PRC.shape[-1] // 2
    values_RC, ids_RC = (side.transpose(0, 1).flatten(1) for side in packed_PRC.split(k, dim=-1))
    values_RC, ids_RC = values_RC.to(dtype), ids_RC.long()
    order = order_best_first(values_RC, ids_RC, k)
    return values_RC.gather(-1, order), ids_RC.gather(-1, order)
