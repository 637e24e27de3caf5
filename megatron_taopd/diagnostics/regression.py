"""Standardised least squares of the gain on what the selectors score. N positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_taopd.diagnostics.estimates import CONFIDENCE, winsorized
from megatron_taopd.diagnostics.libraries import library

MODELS = {
    "decomposition": ("entropy", "learnable", "incompatible", "position", "teacher_entropy"),
    "interaction": (
        "entropy",
        "divergence",
        "entropy_x_divergence",
        "compatibility",
        "position",
        "teacher_entropy",
    ),
}
"""Terms of either model; each is standardised as it stands, products after multiplication."""


def regress(gain: np.ndarray, terms: dict[str, np.ndarray], prompt_index: np.ndarray, model: str) -> dict[str, Any]:
    """Ordinary least squares of z(G), G winsorised at 1 %, on standardised terms; standard errors are clustered by
    prompt, with Student's t of as many degrees as prompts less one.

    Terms that do not vary are left out; where G does not vary all are.
    """
    pandas, stats = library("pandas"), library("scipy.stats")
    response = winsorized(gain, 0.01)
    names = [name for name in MODELS[model] if np.ptp(terms[name]) > 0 and np.ptp(response) > 0]
    found: dict[str, Any] = {
        "model": model,
        "positions": len(gain),
        "prompts": len(np.unique(prompt_index)),
        "r_squared": None,
        "condition_number": None,
        "left_out": [name for name in MODELS[model] if name not in names],
        "terms": [],
        "contrast": None,
    }
    if not names:
        return found
    api = library("statsmodels.api")
    design = pandas.DataFrame({name: stats.zscore(terms[name]) for name in names})
    fit = api.OLS(stats.zscore(response), api.add_constant(design)).fit(
        cov_type="cluster", cov_kwds={"groups": prompt_index}, use_t=True
    )
    intervals = fit.conf_int(1 - CONFIDENCE)
    found["r_squared"] = float(fit.rsquared)
    found["condition_number"] = float(fit.condition_number)
    found["terms"] = [
        {
            "term": name,
            "coefficient": float(fit.params[name]),
            "standard_error": float(fit.bse[name]),
            "interval": [float(edge) for edge in intervals.loc[name]],
            "p_value": float(fit.pvalues[name]),
        }
        for name in names
    ]
    if {"learnable", "incompatible"} <= set(names):
        found["contrast"] = _contrast(fit)
    return found


def _contrast(fit: Any) -> dict[str, Any]:
    """Coefficient of D̃C̃ against that of D̃(1−C̃)."""
    test = fit.t_test("learnable - incompatible = 0")
    return {
        "difference": float(np.squeeze(test.effect)),
        "standard_error": float(np.squeeze(test.sd)),
        "interval": [float(edge) for edge in np.squeeze(test.conf_int(1 - CONFIDENCE))],
        "p_value": float(np.squeeze(test.pvalue)),
        "ratio": float(fit.params["learnable"] / fit.params["incompatible"]),
    }
