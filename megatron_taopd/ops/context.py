"""Which tokens of a sequence a context-parallel rank holds."""

from __future__ import annotations

import torch


def context_positions(length: int, *, rank: int, size: int, device: torch.device | None = None) -> torch.Tensor:
    """Positions in the sequence of a context-parallel rank's tokens, in the order in which it holds them.

    Args:
        length: tokens of the whole sequence; a multiple of ``2 * size`` (of 1 where ``size`` is 1).

    Returns:
        int64 [length / size].
    """
    if size == 1:
        return torch.arange(length, device=device)
    if length % (2 * size):
        raise ValueError(f"a sequence of {length} tokens cannot be cut into {2 * size} chunks of one length")
    chunks = torch.arange(length, device=device).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
