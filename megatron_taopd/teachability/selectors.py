"""Selectors: what makes a position worth keeping. They rank rows; budget and ties are not their business.

R are the rows of this rank. A selector sees normalised quantities that are already comparable over all ranks,
and answers a :class:`Ranking`. Formulas from arXiv 2605.26844, ``tip`` from arXiv 2604.14084.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_taopd.teachability.hashing import uniform_hash
from megatron_taopd.teachability.statistics import TokenStatistics


@dataclass(kw_only=True)
class ScoredPositions:
    """What a selector may look at; tensors [R] in float64 unless said otherwise."""

    statistics: TokenStatistics
    D_norm: torch.Tensor
    """D~ in [0, 1]."""
    C_norm: torch.Tensor
    """C~ in [0, 1] by quantiles."""
    C_scale: torch.Tensor
    """C as it enters products: ``C_norm``, or the raw mass where the configuration says so."""
    H_norm: torch.Tensor
    """H~ in [0, 1]."""
    H_raw: torch.Tensor
    """The entropy that was normalised."""
    sample_index: torch.Tensor
    """int64, index of the response in the whole batch."""
    position: torch.Tensor
    """int64, position in the response."""
    upstream: bool
    """Whether the released code is to be followed."""
    seed: int
    step: int
    normalise: Callable[[torch.Tensor], torch.Tensor]
    """Scale values [R] to [0, 1] by their 5 % and 95 % quantiles over all ranks (a collective)."""
    median: Callable[[torch.Tensor], float]
    """Median of values [R] over all ranks (a collective)."""


@dataclass(kw_only=True)
class Ranking:
    """Higher is kept first."""

    score: torch.Tensor
    """Finite [R]."""
    lead: torch.Tensor | None = None
    """Raw quantity [R] that breaks ties of the score (clipping makes about one in twenty of D~ equal)."""


Selector = Callable[[ScoredPositions], Ranking]


def _soft_or(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a + b - a b, in the form that is exactly 1 where either is 1: those are the ties."""
    return 1 - (1 - a) * (1 - b)


def teachability(rows: ScoredPositions) -> Ranking:
    """Learnable disagreement: large D~ where the teacher's mass lies on what the student would say."""
    return Ranking(score=rows.D_norm * rows.C_scale, lead=rows.statistics.D)


def teachability_entropy(rows: ScoredPositions) -> Ranking:
    """Soft-OR of entropy and learnable disagreement; upstream mode normalises the raw product D C instead."""
    if rows.upstream:
        learnable = rows.normalise(rows.statistics.D.double() * rows.statistics.C.double())
    else:
        learnable = rows.D_norm * rows.C_scale
    return Ranking(score=_soft_or(rows.H_norm, learnable), lead=rows.statistics.D)


def incompatible(rows: ScoredPositions) -> Ranking:
    """The control: disagreement on what the student would not say."""
    return Ranking(score=rows.D_norm * (1 - rows.C_scale), lead=rows.statistics.D)


def entropy(rows: ScoredPositions) -> Ranking:
    """Student entropy alone."""
    return Ranking(score=rows.H_norm, lead=rows.H_raw)


def divergence(rows: ScoredPositions) -> Ranking:
    """Disagreement alone."""
    return Ranking(score=rows.D_norm, lead=rows.statistics.D)


def compatibility(rows: ScoredPositions) -> Ranking:
    """Teacher mass on the student's support alone."""
    return Ranking(score=rows.C_scale, lead=rows.statistics.C)


def tip(rows: ScoredPositions) -> Ranking:
    """Soft-OR of entropy and disagreement."""
    return Ranking(score=_soft_or(rows.H_norm, rows.D_norm), lead=rows.statistics.D)


def q3_teachability(rows: ScoredPositions) -> Ranking:
    """Learnable disagreement where the student is confident and far: H~ below, D~ at or above the median.

    Rows outside that quadrant score -1: they come after all of it, should the budget reach beyond.
    """
    inside = (rows.H_norm < rows.median(rows.H_norm)) & (rows.D_norm >= rows.median(rows.D_norm))
    return Ranking(score=(rows.D_norm * rows.C_scale).where(inside, -1.0), lead=rows.statistics.D)


def prefix(rows: ScoredPositions) -> Ranking:
    """Earlier positions first."""
    return Ranking(score=-rows.position.double())


def random(rows: ScoredPositions) -> Ranking:
    """Uniform, from (seed, step, sample, position) alone."""
    return Ranking(score=uniform_hash(rows.seed, rows.step, rows.sample_index, rows.position))


def full(rows: ScoredPositions) -> Ranking:
    """Every position alike."""
    return Ranking(score=torch.ones_like(rows.D_norm))


SELECTORS: dict[str, Selector] = {
    "teachability": teachability,
    "teachability_entropy": teachability_entropy,
    "q3_teachability": q3_teachability,
    "incompatible": incompatible,
    "divergence": divergence,
    "compatibility": compatibility,
    "entropy": entropy,
    "tip": tip,
    "prefix": prefix,
    "random": random,
    "full": full,
}

USES_COMPATIBILITY = {
    "teachability",
    "teachability_entropy",
    "q3_teachability",
    "incompatible",
    "compatibility",
}

READS_NO_STATISTICS = {"full", "prefix", "random"}
"""Selectors that need the places of the rows alone, and so no forward pass."""
