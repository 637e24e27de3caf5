"""Counter-based random numbers: the same for a position wherever it lives and however often it is asked."""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _logical_shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014); int64 products wrap."""
    x = (x ^ _logical_shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _logical_shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _logical_shift(x, 31)


def uniform_hash(seed: int, step: int, *counters: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1) in float64, one a row, from integers alone.

    Args:
        seed, step: integers.
        counters: int64 tensors [R], in an order that matters.
    """
    state = torch.zeros_like(counters[0])
    for part in (seed, step, *counters):
        part = torch.as_tensor(_signed(part) if isinstance(part, int) else part, device=state.device)
        state = _mix((state ^ part) + _signed(_GOLDEN))
    return _logical_shift(state, 11).double() * 2.0**-53
