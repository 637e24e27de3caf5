"""Series of a run, thinned so that a page of a long run stays small and hides nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_POINTS = 240


@dataclass(kw_only=True)
class Thinned:
    """A series of at most :data:`MOST_POINTS` points."""

    x: list[float]
    y: list[float]
    low: list[float] | None = None
    """Lowest value of each stretch; None where every point is a value of its own."""
    high: list[float] | None = None
    per_point: int = 1
    """Values that a point is the mean of."""


def thin(x: Sequence[float], y: Sequence[float]) -> Thinned:
    """Means over equal stretches, with the range of each; values that are not finite are left out of a mean.

    The stretches depend on the number of values alone, so that series of one run keep a common x.
    """
    if len(x) <= MOST_POINTS:
        return Thinned(x=list(x), y=list(y))
    size = math.ceil(len(x) / MOST_POINTS)
    xs, ys, low, high = [], [], [], []
    for start in range(0, len(x), size):
        part = np.asarray(y[start : start + size], dtype=float)
        part = part[np.isfinite(part)]
        xs.append(float(np.mean(x[start : start + size])))
        ys.append(float(part.mean()) if part.size else math.nan)
        low.append(float(part.min()) if part.size else math.nan)
        high.append(float(part.max()) if part.size else math.nan)
    return Thinned(x=xs, y=ys, low=low, high=high, per_point=size)


def sample_evenly(count: int, most: int) -> list[int]:
    """Up to ``most`` of the indices below ``count``, evenly spaced, the first among them."""
    if count <= most:
        return list(range(count))
    return [i * count // most for i in range(most)]
