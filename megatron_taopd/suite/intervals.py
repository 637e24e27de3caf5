"""Means over seeds with Student-t intervals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_taopd.errors import ConfigError

CONFIDENCE = 0.95


def t_quantile(degrees: int) -> float:
    """Two-sided quantile of Student's t at :data:`CONFIDENCE`.

    Raises:
        ConfigError: scipy is missing.
    """
    try:
        from scipy.special import stdtrit  # scipy.stats has it too, and takes a second more to import
    except ImportError as error:
        raise ConfigError('intervals over seeds need scipy; pip install -e ".[report]"') from error
    return float(stdtrit(degrees, (1 + CONFIDENCE) / 2))


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """``n``, ``mean``, ``sd`` (of the sample) and ``half_width`` of the t-interval; None where n is too small."""
    n = len(values)
    if n == 0:
        return {"n": 0, "mean": None, "sd": None, "half_width": None}
    mean = statistics.fmean(values)
    if n == 1:
        return {"n": 1, "mean": mean, "sd": None, "half_width": None}
    sd = statistics.stdev(values)
    return {"n": n, "mean": mean, "sd": sd, "half_width": t_quantile(n - 1) * sd / n**0.5}


def paired_interval(values: Mapping[int, float], others: Mapping[int, float]) -> dict[str, Any]:
    """:func:`mean_interval` of the differences value - other on the seeds that both have."""
    return mean_interval([values[seed] - others[seed] for seed in values if seed in others])
