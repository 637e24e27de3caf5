"""Numbers from verdicts: pass@k without bias, and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that at least one of k responses is right, from n samples of which c are.

    1 - C(n-c, k) / C(n, k): the share of k-subsets of the samples with a right one, which has no bias
    (arXiv 2107.03374).

    Raises:
        ValueError: not 1 <= k <= n, or not 0 <= c <= n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@{k} of {num_correct} right among {num_samples} samples")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def ks_of(num_samples: int) -> list[int]:
    """The k that are reported: powers of two up to n, and n."""
    powers = [2**i for i in range(num_samples.bit_length())]
    return sorted({*powers, num_samples})


def bootstrap_interval(
    values: Sequence[float], *, seed: int, draws: int = 4000, level: float = 0.95
) -> tuple[float, float] | None:
    """Percentile interval of the mean of independent problems, drawn with replacement.

    Args:
        values: one a problem.
        seed: of the draws.

    Returns:
        Lower and upper end; None with less than two values, which show no spread.
    """
    if len(values) < 2:
        return None
    size = len(values)
    generator = numpy.random.default_rng(seed)
    # Problems with the same value are drawn together: there are no more values than samples of a problem, and one.
    distinct_U, counts_U = numpy.unique(numpy.asarray(values, dtype=numpy.float64), return_counts=True)
    counts_DU = generator.multinomial(size, counts_U / size, size=draws)
    means_D = counts_DU @ distinct_U / size
    tail = (1 - level) / 2
    low, high = numpy.quantile(means_D, [tail, 1 - tail])
    return float(low), float(high)
