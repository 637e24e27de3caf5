"""Everything that ``report.json`` holds: of a bank, and of each checkpoint's gain on it. Keys: docs/diagnostics.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from megatron_taopd import __version__
from megatron_taopd.diagnostics import estimates
from megatron_taopd.diagnostics.bank import FORMAT, FORMAT_VERSION, Bank
from megatron_taopd.diagnostics.config import ReportConfig
from megatron_taopd.diagnostics.estimates import PromptBootstrap, rank_correlation
from megatron_taopd.diagnostics.gain import Gain
from megatron_taopd.diagnostics.regression import MODELS, regress
from megatron_taopd.diagnostics.scores import LABELS, SCORES, Ranked, Scores, as_numpy, kept_overlap
from megatron_taopd.teachability import SELECTORS, SupportMode
from megatron_taopd.teachability.selection import LOW_COMPATIBILITY, LOW_DIVERGENCE, TEACHER_TOP
from megatron_taopd.teachability.selectors import USES_COMPATIBILITY


def analyse(bank: Bank, gains: Sequence[Gain], config: ReportConfig) -> dict[str, Any]:
    """The report as plain objects; numbers that are not defined are NaN.

    Raises:
        ConfigError: the bank has one prompt only, or not this K.
    """
    bank.statistics(config.support_k, "exact")  # refuses another K before anything is computed
    prompt_index = bank.positions["prompt_index"]
    bootstrap = PromptBootstrap(prompt_index, draws=config.bootstrap_draws, seed=config.seed)
    scores = Scores(bank, seed=config.seed)
    ratios = config.resolved_keep_ratios
    return {
        "format": "taopd-diagnostic-report",
        "format_version": 1,
        "taopd_version": __version__,
        "bank": {"format": FORMAT, "format_version": FORMAT_VERSION, "id": bank.record.id, **asdict(bank.record)},
        "settings": {
            "support_k": config.support_k,
            "keep_ratios": ratios,
            "selectors": config.resolved_selectors,
            "bootstrap_draws": config.bootstrap_draws,
            "confidence": estimates.CONFIDENCE,
            "seed": config.seed,
        },
        "labels": LABELS,
        "supports": [_support(bank, k) for k in bank.record.support_k],
        "bound": [_bound(bank, scores, k, ratios) for k in bank.record.support_k],
        "k_sensitivity": [_sensitivity(bank, scores, k, config.support_k, ratios) for k in bank.record.support_k],
        "checkpoints": [_checkpoint(gain, scores, bootstrap, config) for gain in gains],
        "comparisons": [_compare(gain, gains[0], bootstrap) for gain in gains[1:]],
    }


def _support(bank: Bank, k: int) -> dict[str, Any]:
    statistics = bank.statistics(k, "exact")
    return {
        "support_k": k,
        "C": _spread(as_numpy(statistics.C)),
        "D": _spread(as_numpy(statistics.D)),
        "low_C_share": _share(as_numpy(statistics.C) < LOW_COMPATIBILITY),
        "low_D_share": _share(as_numpy(statistics.D) < LOW_DIVERGENCE),
        **{
            name: float(as_numpy(getattr(statistics, name)).mean())
            for name in ("overlap", "student_mass", "teacher_mass")
        },
        "teacher_top5_share": _share(statistics.rank_in_teacher.numpy() < TEACHER_TOP) if k >= TEACHER_TOP else None,
    }


def _bound(bank: Bank, scores: Scores, k: int, ratios: Sequence[float]) -> dict[str, Any]:
    """What two top-K lists cannot see."""
    exact, upstream = (bank.statistics(k, mode) for mode in ("exact", "upstream"))
    gaps = {name: as_numpy(getattr(exact, name)) - as_numpy(getattr(upstream, name)) for name in ("C", "D")}
    ranked = [scores.ranked("teachability", k, mode) for mode in ("exact", "upstream")]
    return {
        "support_k": k,
        "C_gap": _tail(gaps["C"]),
        "D_gap": _tail(np.abs(gaps["D"])),
        "C_gap_above_1e-2": _share(gaps["C"] > 1e-2),
        "C_gap_above_1e-1": _share(gaps["C"] > 1e-1),
        "spearman_C": rank_correlation(as_numpy(exact.C), as_numpy(upstream.C)),
        "spearman_D": rank_correlation(as_numpy(exact.D), as_numpy(upstream.D)),
        "spearman_score": rank_correlation(ranked[0].score, ranked[1].score),
        "kept_overlap": kept_overlap(ranked[0], ranked[1], ratios),
    }


def _sensitivity(bank: Bank, scores: Scores, k: int, reference: int, ratios: Sequence[float]) -> dict[str, Any]:
    one, other = bank.statistics(k, "exact"), bank.statistics(reference, "exact")
    ranked = [scores.ranked("teachability", size) for size in (k, reference)]
    return {
        "support_k": k,
        "spearman_D": rank_correlation(as_numpy(one.D), as_numpy(other.D)),
        "spearman_C": rank_correlation(as_numpy(one.C), as_numpy(other.C)),
        "spearman_score": rank_correlation(ranked[0].score, ranked[1].score),
        "kept_overlap": kept_overlap(ranked[0], ranked[1], ratios),
    }


def _checkpoint(gain: Gain, scores: Scores, bootstrap: PromptBootstrap, config: ReportConfig) -> dict[str, Any]:
    columns = {name: values.astype(np.float64) for name, values in gain.columns.items() if name != "id"}
    values, before = columns["gain"], columns["kl_forward_before"]
    by_score = {name: scores.ranked(name, config.support_k).score for name in SCORES}
    regions = scores.regions(config.support_k)
    return {
        "name": gain.name,
        "gain_file": gain.file,
        "checkpoint": {"path": gain.checkpoint.path, "fingerprint": gain.checkpoint.fingerprint},
        "gain": {
            **estimates.robust_gain(values, before, columns["kl_forward_after"], bootstrap),
            **{name: float(columns[name].mean()) for name in ("kl_reverse_before", "kl_reverse_after")},
        },
        "quartiles": estimates.quartile_rows(values, by_score, regions, bootstrap),
        "terciles": estimates.tercile_rows(values, by_score, regions, bootstrap),
        "regressions": _regressions(values, scores, bootstrap.prompt_index),
        "budgets": [
            _budget(values, before, ranked, ratio, bootstrap)
            for ranked in _rankings(scores, config)
            for ratio in config.resolved_keep_ratios
        ],
    }


def _regressions(gain: np.ndarray, scores: Scores, prompt_index: np.ndarray) -> list[dict[str, Any]]:
    modes: tuple[SupportMode, ...] = ("exact", "upstream")
    found = []
    for k in scores.bank.record.support_k:
        for mode in modes:
            for scale in ("quantile", "raw"):
                terms = scores.terms(k, mode, scale)
                settings = {"support_k": k, "support_mode": mode, "compatibility_scale": scale}
                found += [settings | regress(gain, terms, prompt_index, model) for model in MODELS]
    return found


def _rankings(scores: Scores, config: ReportConfig) -> list[Ranked]:
    """Every selector at the K of the report, those with C also by its raw mass and as the released code would have it;
    teachability at every K."""
    k, rankings = config.support_k, []
    for selector in config.resolved_selectors:
        rankings.append(scores.ranked(selector, k))
        if selector in USES_COMPATIBILITY - {"compatibility"}:  # which ranks alike, scaled or not
            rankings.append(scores.ranked(selector, k, "exact", "raw"))
        if selector in SELECTORS and selector not in ("random", "prefix", "full", "entropy"):
            rankings.append(scores.ranked(selector, k, "upstream"))
        if selector == "teachability":
            rankings += [scores.ranked(selector, other) for other in scores.bank.record.support_k if other != k]
    return rankings


def _budget(
    gain: np.ndarray, before: np.ndarray, ranked: Ranked, keep_ratio: float, bootstrap: PromptBootstrap
) -> dict[str, Any]:
    """Gain at the positions that a selector keeps."""
    keep = ranked.keep(keep_ratio)
    total = gain.sum()
    return {
        "selector": ranked.selector,
        "support_k": ranked.support_k,
        "support_mode": ranked.support_mode,
        "compatibility_scale": ranked.compatibility_scale,
        "keep_ratio": keep_ratio,
        "kept": int(keep.sum()),
        "mean": float(gain[keep].mean()),
        "interval": bootstrap.mean(gain, keep),
        "median": float(np.median(gain[keep])),
        "gain_share": float(gain[keep].sum() / total) if total != 0 else float("nan"),
        "kl_forward_before": float(before[keep].mean()),
        "gap_closed": estimates.gap_closed(gain[keep], before[keep]),
    }


def _compare(gain: Gain, reference: Gain, bootstrap: PromptBootstrap) -> dict[str, Any]:
    difference = gain.columns["gain"].astype(np.float64) - reference.columns["gain"].astype(np.float64)
    return {
        "checkpoint": gain.name,
        "reference": reference.name,
        "mean_difference": float(difference.mean()),
        "interval": bootstrap.mean(difference),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    quantiles = {f"q{q:02d}": float(np.quantile(values, q / 100)) for q in (5, 25, 50, 75, 95)}
    return {"mean": float(values.mean()), **quantiles}


def _tail(values: np.ndarray) -> dict[str, float]:
    quantiles = {f"q{q:02d}": float(np.quantile(values, q / 100)) for q in (50, 95, 99)}
    return {"mean": float(values.mean()), **quantiles, "max": float(values.max())}


def _share(mask: np.ndarray) -> float:
    return float(np.mean(mask))
