"""Which prompts are read together: padding costs as much as tokens, and a forward costs something by itself."""

from __future__ import annotations

from collections.abc import Sequence

# A forward of its own costs about as much as so many tokens more in another one (reading the weights, Python).
FORWARD_COST = 32
# Tokens of a forward, padding included, unless one prompt is longer: bounds the memory of activations.
MAX_TOKENS = 8192


def prefill_groups(lengths: Sequence[int], *, max_tokens: int = MAX_TOKENS) -> list[slice]:
    """The cheapest split of prompts into forwards, each padded to its longest prompt.

    Args:
        lengths: of the prompts (tokens), ascending.
        max_tokens: most tokens of a forward of several prompts.

    Returns:
        Consecutive slices over the prompts.
    """
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first i prompts, start of their last group
    for stop in range(1, len(lengths) + 1):
        longest = lengths[stop - 1]
        options = []
        for start in range(stop - 1, -1, -1):
            tokens = (stop - start) * longest
            if tokens > max_tokens and start < stop - 1:
                break
            options.append((best[start][0] + tokens + FORWARD_COST, start))
        best.append(min(options))
    groups: list[slice] = []
    stop = len(lengths)
    while stop:
        start = best[stop][1]
        groups.append(slice(start, stop))
        stop = start
    return groups[::-1]
