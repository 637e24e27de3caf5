"""pass@k against every subset; intervals against another way to the same number."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest

from megatron_taopd.evaluation.estimates import bootstrap_interval, ks_of, pass_at_k


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            right = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(right, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, 1, 0), (4, -1, 1)])
def test_what_makes_no_sense(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="samples"):
        pass_at_k(n, c, k)


def test_which_k() -> None:
    assert [ks_of(n) for n in (1, 2, 3, 8, 10)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 10]]


def test_interval_of_few_problems_against_all_draws() -> None:
    values = [0.0, 0.25, 0.5, 1.0]
    draws = [sum(draw) / 4 for draw in itertools.product(values, repeat=4)]
    wanted = numpy.quantile(draws, [0.025, 0.975])
    low, high = bootstrap_interval(values, seed=1, draws=40_000) or (math.nan, math.nan)
    # means lie a sixteenth apart, so that a quantile may be the next one
    assert abs(low - wanted[0]) <= 1 / 16 and abs(high - wanted[1]) <= 1 / 16
    low, high = bootstrap_interval(values, seed=1, draws=40_000, level=0.5) or (math.nan, math.nan)
    wanted = numpy.quantile(draws, [0.25, 0.75])
    assert abs(low - wanted[0]) <= 1 / 16 and abs(high - wanted[1]) <= 1 / 16


def test_interval_of_many_problems_against_the_normal_one() -> None:
    values = [1.0] * 300 + [0.0] * 700
    low, high = bootstrap_interval(values, seed=3) or (math.nan, math.nan)
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - spread, abs=0.003) and high == pytest.approx(0.3 + spread, abs=0.003)


def test_interval_depends_on_the_seed_alone_and_needs_two_problems() -> None:
    values = [0.0, 1.0] * 10
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
    assert bootstrap_interval([0.5], seed=5) is None
