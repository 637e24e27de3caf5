"""Normalise quantities over the rollout batch of all ranks."""

from __future__ import annotations

import math

import torch

LOW, HIGH = 0.05, 0.95
MIN_SPREAD = 1e-12


def normalise(values: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """clip((x - low) / (high - low), 0, 1) in float64.

    A spread below 1e-12 gives 0 everywhere, a non-finite x gives 0.

    Args:
        values: [R].
        low, high: 5 % and 95 % quantiles over the finite values of the batch (NaN where there are none).
    """
    values = values.double()
    if math.isnan(high - low) or high - low < MIN_SPREAD:
        return torch.zeros_like(values)
    return ((values - low) / (high - low)).clamp(0.0, 1.0).where(values.isfinite(), 0.0)
