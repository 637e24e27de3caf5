"""Choosing a token from logits, with random numbers that depend on counters and not on a generator.

B samples, V vocabulary.
"""

from __future__ import annotations

import torch

from megatron_taopd.teachability.hashing import uniform_hash

# Keeps these numbers apart from others drawn from the same seed, step, sample and position.
_STREAM = 0x726F6C6C6F7574


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample a token a row by inverting the cumulative distribution.

    Args:
        logits_BV: any float type; columns from ``vocab_size`` on are ignored.
        numbers_B: float64 in [0, 1), see :func:`sampling_numbers`.
        temperature: divides the logits; 0 takes the likeliest token (the lower id among equals).
        top_p: sample from the fewest likeliest tokens that together have this probability.

    Returns:
        Token ids [B], and their log-probabilities [B] in float32: the log softmax of logits / temperature
        over the ``vocab_size`` ids, whatever ``top_p``; at temperature 0 that of the logits as they are.
    """
    logits = logits_BV[:, :vocab_size].float()
    if temperature > 0:
        logits = logits / temperature
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    if temperature > 0:
        tokens_B = _invert(log_probs.exp(), numbers_B, top_p)
    else:
        # argmax is free to answer any of several equal maxima.
        tokens_B = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    return tokens_B, log_probs.gather(-1, tokens_B[:, None]).squeeze(-1)


def _invert(probs_BV: torch.Tensor, numbers_B: torch.Tensor, top_p: float | None) -> torch.Tensor:
    order = None
    if top_p is not None and top_p < 1:
        probs_BV, order = probs_BV.sort(dim=-1, descending=True, stable=True)
        before = probs_BV.cumsum(-1, dtype=torch.float64) - probs_BV
        probs_BV = probs_BV.where(before < top_p, 0.0)
    cumulative = probs_BV.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Below the total, so that the place found has a probability above zero.
    target = (numbers_B[:, None] * total).minimum(torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(cumulative, target, right=True).clamp_(max=probs_BV.shape[-1] - 1)
    return (place if order is None else order.gather(-1, place)).squeeze(-1)
