"""Choosing a token from logits, with random numbers that depend on counters and not on a generator.

B samples, V columns of the vocabulary on this rank, R ranks that share the vocabulary.
"""

from __future__ import annotations

import torch

from megatron_taopd.ops.collectives import Group, all_gather, all_reduce_sum, group_rank
from megatron_taopd.teachability.hashing import uniform_hash

# Keeps these numbers apart from others drawn from the same seed, step, sample and position.
_STREAM = 0x726F6C6C6F7574
# Columns that are summed before the place of a token among them is looked for.
_BLOCK = 128
# The nucleus is first looked for among so many of the likeliest tokens: sorting a vocabulary is slow.
_LIKELIEST = 1024


def sampling_numbers(seed: int, step: int, sample_index_B: torch.Tensor, position_B: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) a sample, float64: the same wherever and beside whom it is generated.

    Args:
        sample_index_B: int64; index in the global batch.
        position_B: int64; position in the response.
    """
    return uniform_hash(seed, step, sample_index_B, position_B, torch.full_like(position_B, _STREAM))


def choose_tokens(
    logits_BV: torch.Tensor,
    numbers_B: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float,
    top_p: float | None = None,
    group: Group = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample a token a row by inverting the cumulative distribution over the ids in their order.

    Args:
        logits_BV: any float type; columns of ids from ``vocab_size`` on are ignored.
        numbers_B: float64 in [0, 1), see :func:`sampling_numbers`.
        temperature: divides the logits; 0 takes the likeliest token (the lower id among equals).
        top_p: sample from the fewest likeliest tokens that together have this probability (of equally likely
            ones the lower ids).
        group: ranks that hold equal shards of the vocabulary, in rank order; None: all of it is here. A few numbers
            a sample travel; with ``top_p`` the logits do.

    Returns:
        Token ids [B], and their log-probabilities [B] in float32: the log softmax of logits / temperature
        over the ``vocab_size`` ids, whatever ``top_p``; at temperature 0 that of the logits as they are. The same on
        every rank of the group.
    """
    nucleus = top_p is not None and top_p < 1 and temperature > 0
    if nucleus:
        logits_BV, group = all_gather(logits_BV, group).transpose(0, 1).flatten(1), None
    first_id = group_rank(group) * logits_BV.shape[1]
    real = min(max(vocab_size - first_id, 0), logits_BV.shape[1])
    # A shard of padding alone takes part too: one column, of no weight.
    logits = logits_BV[:, : max(real, 1)].float()
    if real == 0:
        logits = torch.full_like(logits, torch.finfo(torch.float32).min)
    highest_B = logits.amax(-1)
    weights_BV = (logits - highest_B[:, None]).mul_(1 / (temperature or 1.0)).exp_()
    if real == 0:
        weights_BV.zero_()
    if weights_BV.shape[1] % _BLOCK:
        weights_BV = torch.nn.functional.pad(weights_BV, (0, -weights_BV.shape[1] % _BLOCK))
    blocks_Bn = weights_BV.view(len(logits), -1, _BLOCK).sum(-1).double()

    # Highest logit and weight of every shard, then all on one scale.
    highest_RB, weight_RB = all_gather(torch.stack([highest_B.double(), blocks_Bn.sum(-1)]), group).unbind(1)
    scale_RB = ((highest_RB - highest_RB.amax(0)) / (temperature or 1.0)).exp()
    cumulative_RB = (weight_RB * scale_RB).cumsum(0)
    log_total_B = cumulative_RB[-1].log()
    if temperature == 0:
        owner_B = (highest_RB == highest_RB.amax(0)).int().argmax(0)
        place_B = (logits == highest_B[:, None]).int().argmax(-1)  # argmax of logits may answer any of equal maxima
    else:
        if nucleus:
            assert top_p is not None
            weights_BV = _nucleus(weights_BV, top_p)
            blocks_Bn = weights_BV.view(len(logits), -1, _BLOCK).sum(-1).double()
            cumulative_RB = blocks_Bn.sum(-1)[None]
        target_B = _below(numbers_B * cumulative_RB[-1], cumulative_RB[-1])
        owner_B = (cumulative_RB <= target_B).sum(0).clamp_(max=len(cumulative_RB) - 1)
        me = group_rank(group)
        before_B = cumulative_RB[me] - weight_RB[me] * scale_RB[me] if me else 0.0
        place_B = _invert(weights_BV, blocks_Bn, (target_B - before_B) / scale_RB[me])
    place_B = place_B.clamp_(max=logits.shape[1] - 1)
    logprobs_B = (logits.gather(-1, place_B[:, None])[:, 0] - highest_RB.amax(0)) / (temperature or 1.0) - log_total_B
    drawn_2B = torch.stack([(place_B + first_id).double(), logprobs_B])
    drawn_2B = all_reduce_sum(drawn_2B.where(owner_B == group_rank(group), 0.0), group)
    return drawn_2B[0].long(), drawn_2B[1].float()


def _invert(weights_BV: torch.Tensor, blocks_Bn: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
    """The first column up to which the weights exceed the target; never one of weight 0.

    Adding up in double precision is slow, so only the blocks and one block's columns are.
    """
    block_B, before_B = _first_above(blocks_Bn, target_B)
    chosen_Bn = weights_BV.view(*blocks_Bn.shape, _BLOCK)[torch.arange(len(block_B), device=block_B.device), block_B]
    column_B, _ = _first_above(chosen_Bn, target_B - before_B)
    return block_B * _BLOCK + column_B


def _first_above(weights_BN: torch.Tensor, target_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first entry up to which the weights exceed the target, and the weight before it."""
    cumulative_BN = weights_BN.cumsum(-1, dtype=torch.float64)
    target_B1 = _below(target_B, cumulative_BN[:, -1])[:, None]
    place_B1 = torch.searchsorted(cumulative_BN, target_B1, right=True).clamp_(max=weights_BN.shape[1] - 1)
    before_B1 = cumulative_BN.gather(-1, place_B1) - weights_BN.gather(-1, place_B1)
    return place_B1[:, 0], before_B1[:, 0]


def _below(target_B: torch.Tensor, total_B: torch.Tensor) -> torch.Tensor:
    """Within [0, total): rounding must not lead past the last weight above zero."""
    return target_B.clamp_min(0.0).minimum(torch.nextafter(total_B, torch.zeros_like(total_B)))


def _nucleus(weights_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The weights of the fewest likeliest tokens that have ``top_p`` of all weight; 0 elsewhere."""
    enough_B1 = top_p * weights_BV.sum(-1, dtype=torch.float64, keepdim=True)
    for count in (_LIKELIEST, weights_BV.shape[1]):
        likeliest_BN = weights_BV.topk(min(count, weights_BV.shape[1])).values
        before_BN = likeliest_BN.cumsum(-1, dtype=torch.float64) - likeliest_BN
        kept_B1 = (before_BN < enough_B1).sum(-1, keepdim=True)
        if int(kept_B1.max()) < count:
            break
    smallest_B1 = likeliest_BN.gather(-1, (kept_B1 - 1).clamp_min(0))
    above_BV, equal_BV = weights_BV > smallest_B1, weights_BV == smallest_B1
    fits_BV = equal_BV.cumsum(-1) <= kept_B1 - above_BV.sum(-1, keepdim=True)
    return weights_BV.where(above_BV | (equal_BV & fits_BV), 0.0)
