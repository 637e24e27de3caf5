"""Means of the gain by group of positions, with intervals from resampling whole prompts. N positions, P prompts.

Positions of one prompt are not independent, so that an interval from single positions would be too narrow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_taopd.diagnostics.libraries import library
from megatron_taopd.errors import ConfigError

CONFIDENCE = 0.95


class PromptBootstrap:
    """Percentile intervals of ratios of sums; the same draws for every question. A draw that has none of the positions
    asked about is left out."""

    def __init__(self, prompt_index: np.ndarray, *, draws: int, seed: int) -> None:
        """
        Args:
            prompt_index: [N], from 0.

        Raises:
            ConfigError: there is one prompt only.
        """
        self.prompt_index = prompt_index
        self.num_prompts = int(prompt_index.max()) + 1
        if self.num_prompts < 2:
            raise ConfigError("the bank has 1 prompt and intervals come from resampling prompts; make one with more")
        self.draws = draws
        self.seed = seed

    def mean(self, values: np.ndarray, mask: np.ndarray | None = None) -> list[float]:
        """Interval of the mean of values [N] over the positions of a mask."""
        return self._interval(lambda total, count, axis: _ratio(total, count, axis), *self._sums(values, mask))

    def difference(self, values: np.ndarray, high: np.ndarray, low: np.ndarray) -> list[float]:
        """Interval of the mean over one mask less that over another."""
        return self._interval(
            lambda total_h, count_h, total_l, count_l, axis: (
                _ratio(total_h, count_h, axis) - _ratio(total_l, count_l, axis)
            ),
            *self._sums(values, high),
            *self._sums(values, low),
        )

    def _sums(self, values: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Of each prompt [P]: sum of the values and number of the positions."""
        weight = np.ones(len(values)) if mask is None else mask.astype(np.float64)
        return (
            np.bincount(self.prompt_index, weights=np.where(weight > 0, values, 0.0), minlength=self.num_prompts),
            np.bincount(self.prompt_index, weights=weight, minlength=self.num_prompts),
        )

    def _interval(self, statistic: Callable[..., np.ndarray], *sums: np.ndarray) -> list[float]:
        stats = library("scipy.stats")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # all draws alike: an interval of no width
            result = stats.bootstrap(
                sums,
                statistic,
                paired=True,
                vectorized=True,
                n_resamples=self.draws,
                confidence_level=CONFIDENCE,
                method="percentile",
                rng=np.random.default_rng(self.seed),
            )
        tail = (1 - CONFIDENCE) / 2
        return [float(edge) for edge in np.nanquantile(result.bootstrap_distribution, [tail, 1 - tail])]


def _ratio(total: np.ndarray, count: np.ndarray, axis: int) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return total.sum(axis) / count.sum(axis)


def equal_parts(values: np.ndarray, parts: int) -> np.ndarray:
    """Quartile (or tercile ...) of each value from 0, lowest first; equal values share one, so sizes may differ."""
    place = library("scipy.stats").rankdata(values, method="average")
    return np.minimum((place - 0.5) * parts / len(values), parts - 1).astype(np.int64)


def robust_gain(gain: np.ndarray, before: np.ndarray, after: np.ndarray, bootstrap: PromptBootstrap) -> dict[str, Any]:
    """Mean gain, and means that outliers do not move.

    Args:
        gain: [N], before − after.
        before, after: KL_f of θ0 and θ1.
    """
    stats = library("scipy.stats")
    quantiles = {f"q{q:02d}": float(np.quantile(gain, q / 100)) for q in (1, 5, 25, 75, 95, 99)}
    return {
        "positions": len(gain),
        "mean": float(gain.mean()),
        "interval": bootstrap.mean(gain),
        "median": float(np.median(gain)),
        "trimmed_5_95": float(stats.trim_mean(gain, 0.05)),
        "winsorized_1_99": float(winsorized(gain, 0.01).mean()),
        "winsorized_5_95": float(winsorized(gain, 0.05).mean()),
        "std": float(gain.std()),
        "positive_share": float((gain > 0).mean()),
        **quantiles,
        "kl_forward_before": float(before.mean()),
        "kl_forward_after": float(after.mean()),
        "gap_closed": gap_closed(gain, before),
    }


def winsorized(values: np.ndarray, share: float) -> np.ndarray:
    """The lowest and the highest share of the values replaced by the nearest that is left."""
    return np.asarray(library("scipy.stats").mstats.winsorize(values, limits=(share, share)))


def gap_closed(gain: np.ndarray, before: np.ndarray) -> float:
    """Share of the divergence of θ0 that is gone: 1 − after / before over all positions given; NaN where it was 0."""
    total = before.sum()
    return float(gain.sum() / total) if total > 0 else float("nan")


def quartile_rows(
    gain: np.ndarray, scores: dict[str, np.ndarray], regions: dict[str, np.ndarray], bootstrap: PromptBootstrap
) -> list[dict[str, Any]]:
    """Gain in each quartile of each score, cut anew within each region."""
    rows = []
    for region, inside in regions.items():
        for name, score in scores.items():
            part = np.full(len(gain), -1)
            part[inside] = equal_parts(score[inside], 4) if inside.any() else []
            for quartile in range(4):
                mask = part == quartile
                some = mask.any()
                rows.append(
                    {
                        "region": region,
                        "score": name,
                        "quartile": quartile + 1,
                        "positions": int(mask.sum()),
                        "mean": float(gain[mask].mean()) if some else None,
                        "interval": bootstrap.mean(gain, mask) if some else [None, None],
                        "median": float(np.median(gain[mask])) if some else None,
                        "score_low": float(score[mask].min()) if some else None,
                        "score_high": float(score[mask].max()) if some else None,
                    }
                )
    return rows


def tercile_rows(
    gain: np.ndarray, scores: dict[str, np.ndarray], regions: dict[str, np.ndarray], bootstrap: PromptBootstrap
) -> list[dict[str, Any]]:
    """Mean gain in the highest third of each score less that in the lowest. The thirds are those of the whole bank in
    every draw."""
    rows = []
    for region, inside in regions.items():
        for name, score in scores.items():
            part = np.full(len(gain), -1)
            part[inside] = equal_parts(score[inside], 3) if inside.any() else []
            low, high = part == 0, part == 2
            both = low.any() and high.any()
            means = [float(gain[mask].mean()) if mask.any() else None for mask in (low, high)]
            rows.append(
                {
                    "region": region,
                    "score": name,
                    "positions_low": int(low.sum()),
                    "positions_high": int(high.sum()),
                    "mean_low": means[0],
                    "mean_high": means[1],
                    "difference": float(gain[high].mean() - gain[low].mean()) if both else None,
                    "interval": bootstrap.difference(gain, high, low) if both else [None, None],
                }
            )
    return rows


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; NaN where one does not vary."""
    stats = library("scipy.stats")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(stats.spearmanr(one, other).statistic)
