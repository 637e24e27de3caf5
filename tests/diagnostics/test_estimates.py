"""Means, intervals and regressions against numbers by hand, enumeration and closed formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas
import pytest
from scipy import stats

from megatron_taopd.diagnostics import estimates
from megatron_taopd.diagnostics.estimates import PromptBootstrap, equal_parts
from megatron_taopd.diagnostics.regression import MODELS, regress
from megatron_taopd.errors import ConfigError


def test_robust_gain_by_hand() -> None:
    # 0 ... 19 and one outlier in place of 20
    gain = np.array([*range(20), 1000.0])[::-1].copy()
    before = np.full(21, 100.0)
    prompts = np.arange(21) % 3
    found = estimates.robust_gain(gain, before, before - gain, PromptBootstrap(prompts, draws=100, seed=0))
    assert found["positions"] == 21
    assert found["mean"] == pytest.approx((190 + 1000) / 21)
    assert found["median"] == 10
    assert found["trimmed_5_95"] == pytest.approx(sum(range(1, 20)) / 19)  # floor(0.05 * 21) = 1 from either end
    assert found["winsorized_5_95"] == pytest.approx((1 + sum(range(1, 20)) + 19) / 21)
    assert found["winsorized_1_99"] == found["mean"]  # floor(0.01 * 21) = 0
    assert found["positive_share"] == pytest.approx(20 / 21)
    assert found["q05"] == pytest.approx(1.0) and found["q95"] == pytest.approx(19.0)
    assert found["std"] == pytest.approx(math.sqrt(sum((g - found["mean"]) ** 2 for g in gain) / 21))
    assert found["gap_closed"] == pytest.approx(1190 / 2100)
    assert found["kl_forward_after"] == pytest.approx(100 - 1190 / 21)


def test_quartiles_are_those_of_pandas_and_ties_stay_together() -> None:
    values = np.random.default_rng(0).permutation(np.linspace(-1, 1, 37)) ** 3
    for parts in (3, 4):
        wanted = pandas.qcut(pandas.Series(values), parts, labels=False).to_numpy()
        # where a value lies on an edge either part is right: at most one a cut
        assert (equal_parts(values, parts) != wanted).sum() <= parts - 1
    eight = np.array([5.0, 1.0, 7.0, 3.0, 2.0, 8.0, 6.0, 4.0])
    assert equal_parts(eight, 4).tolist() == [2, 0, 3, 1, 0, 3, 2, 1]
    # six of ten are 1: their places are 5 ... 10, on average 7.5, the third quarter
    assert equal_parts(np.array([1.0] * 6 + [0.1, 0.2, 0.3, 0.4]), 4).tolist() == [2] * 6 + [0, 0, 1, 1]
    assert equal_parts(np.zeros(5), 4).tolist() == [2] * 5


def test_interval_of_three_prompts_is_that_of_all_27_draws() -> None:
    prompts = np.array([0, 0, 0, 1, 2, 2])
    values = np.array([1.0, 2.0, 6.0, -4.0, 10.0, 20.0])
    high = np.array([False, True, True, True, False, True])
    bootstrap = PromptBootstrap(prompts, draws=20_000, seed=3)

    def draws(mask: np.ndarray) -> list[np.ndarray]:
        return [
            np.concatenate([values[(prompts == p) & mask] for p in draw])
            for draw in itertools.product(range(3), repeat=3)
        ]

    everything = np.ones(6, dtype=bool)
    means = [v.mean() for v in draws(everything)]
    # The two ends have a probability of 1/27 each, more than the 2.5 % beyond an interval.
    assert bootstrap.mean(values) == pytest.approx([min(means), max(means)])
    # The low positions of a draw of prompt 1 alone are none; the other 26 draws decide.
    pairs = [(h.mean(), low.mean()) for h, low in zip(draws(high), draws(~high), strict=True) if len(low)]
    differences = [h - low for h, low in pairs]
    assert len(differences) == 26
    assert bootstrap.difference(values, high, ~high) == pytest.approx([min(differences), max(differences)])


def test_interval_of_many_prompts_is_that_of_the_linearised_ratio() -> None:
    rng = np.random.default_rng(1)
    prompts = np.repeat(np.arange(60), rng.integers(1, 9, 60))
    values = rng.normal(size=60)[prompts] + rng.normal(size=len(prompts))
    mask = rng.random(len(prompts)) < 0.7
    low, high = PromptBootstrap(prompts, draws=4000, seed=0).mean(values, mask)
    mean = values[mask].mean()
    residual = [(values[mask & (prompts == p)] - mean).sum() for p in range(60)]
    error = math.sqrt(sum(r * r for r in residual)) / mask.sum()
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert (low + high) / 2 == pytest.approx(mean, abs=0.1 * error * 2)
    # Single positions would be far too sure of themselves.
    assert high - low > 1.3 * 2 * 1.96 * values[mask].std() / math.sqrt(mask.sum())


def test_one_prompt_has_no_interval() -> None:
    with pytest.raises(ConfigError, match="the bank has 1 prompt and intervals come from resampling prompts"):
        PromptBootstrap(np.zeros(5, dtype=int), draws=10, seed=0)


def test_quartile_and_tercile_tables_by_hand() -> None:
    gain = np.arange(12.0)
    scores = {"s": -np.arange(12.0)}
    regions = {"all": np.ones(12, dtype=bool), "q3": np.arange(12) < 3}
    bootstrap = PromptBootstrap(np.arange(12) % 4, draws=50, seed=0)
    quartiles = estimates.quartile_rows(gain, scores, regions, bootstrap)
    assert [(r["region"], r["quartile"], r["positions"]) for r in quartiles] == [
        *(("all", q, 3) for q in (1, 2, 3, 4)),
        *(("q3", q, n) for q, n in ((1, 1), (2, 0), (3, 1), (4, 1))),
    ]
    assert [r["mean"] for r in quartiles] == [10, 7, 4, 1, 2, None, 1, 0]
    assert (quartiles[0]["score_low"], quartiles[0]["score_high"], quartiles[0]["median"]) == (-11, -9, 10)
    terciles = estimates.tercile_rows(gain, scores, regions, bootstrap)
    assert [(r["mean_low"], r["mean_high"], r["difference"]) for r in terciles] == [(9.5, 1.5, -8.0), (2, 0, -2)]
    low, high = terciles[0]["interval"]
    assert low <= -8 <= high


@pytest.fixture()
def table() -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(5)
    prompts = np.repeat(np.arange(25), 8)
    d, c, h = (rng.random(200) for _ in range(3))
    terms = {
        "entropy": h,
        "divergence": d,
        "compatibility": c,
        "learnable": d * c,
        "incompatible": d * (1 - c),
        "entropy_x_divergence": h * d,
        "position": np.tile(np.arange(8.0), 25),
        "teacher_entropy": rng.random(200),
    }
    gain = 2 * d * c + d * (1 - c) + 0.3 * rng.standard_t(2, 200) + 0.3 * rng.normal(size=25)[prompts]
    return gain, terms, prompts


@pytest.mark.parametrize("model", MODELS)
def test_regression_is_that_of_the_formulas(table, model: str) -> None:
    gain, terms, prompts = table
    found = regress(gain, terms, prompts, model)
    ordered = np.sort(gain)
    clipped = np.clip(gain, ordered[2], ordered[-3])  # 1 % of 200 is 2 at either end
    y = (clipped - clipped.mean()) / np.sqrt(((clipped - clipped.mean()) ** 2).mean())
    names = [term["term"] for term in found["terms"]]
    assert names == list(MODELS[model])
    columns = [terms[name] for name in names]
    x = np.column_stack([np.ones(200), *((v - v.mean()) / v.std() for v in columns)])
    beta, *_ = np.linalg.lstsq(x, y, rcond=None)
    residual = y - x @ beta
    bread = np.linalg.inv(x.T @ x)
    meat = sum(np.outer(s, s) for s in (x[prompts == p].T @ residual[prompts == p] for p in range(25)))
    covariance = bread @ meat @ bread * (25 / 24) * (199 / (200 - x.shape[1]))
    error = np.sqrt(np.diag(covariance))
    quantile = stats.t.ppf(0.975, 24)
    for place, term in enumerate(found["terms"], start=1):
        assert term["coefficient"] == pytest.approx(beta[place])
        assert term["standard_error"] == pytest.approx(error[place])
        edges = [beta[place] - quantile * error[place], beta[place] + quantile * error[place]]
        assert term["interval"] == pytest.approx(edges)
        assert term["p_value"] == pytest.approx(2 * stats.t.sf(abs(beta[place] / error[place]), 24))
    assert found["r_squared"] == pytest.approx(1 - (residual**2).sum() / (y**2).sum())
    assert (found["positions"], found["prompts"], found["left_out"]) == (200, 25, [])
    if model == "interaction":
        assert found["contrast"] is None
        return
    a, b = names.index("learnable") + 1, names.index("incompatible") + 1
    contrast = found["contrast"]
    assert contrast["difference"] == pytest.approx(beta[a] - beta[b])
    spread = math.sqrt(covariance[a, a] + covariance[b, b] - 2 * covariance[a, b])
    assert contrast["standard_error"] == pytest.approx(spread)
    assert contrast["interval"][0] == pytest.approx(beta[a] - beta[b] - quantile * spread)
    assert contrast["ratio"] == pytest.approx(beta[a] / beta[b])


def test_what_does_not_vary_is_left_out(table) -> None:
    gain, terms, prompts = table
    terms = terms | {"position": np.zeros(200), "incompatible": np.full(200, 0.25)}
    found = regress(gain, terms, prompts, "decomposition")
    assert found["left_out"] == ["incompatible", "position"]
    assert [term["term"] for term in found["terms"]] == ["entropy", "learnable", "teacher_entropy"]
    assert found["contrast"] is None
    nothing = regress(np.zeros(200), terms, prompts, "decomposition")
    assert nothing["terms"] == [] and nothing["r_squared"] is None and len(nothing["left_out"]) == 5
