"""From two models' logits to the positions worth training on: statistics, scores, selection."""

from megatron_taopd.teachability.carried import CarriedEstimate
from megatron_taopd.teachability.selection import Selection, SelectionConfig, select
from megatron_taopd.teachability.selectors import SELECTORS, Ranking, ScoredPositions
from megatron_taopd.teachability.statistics import (
    Support,
    SupportMode,
    TokenStatistics,
    concat_statistics,
    statistics_by_support,
    token_statistics,
)

__all__ = [
    "SELECTORS",
    "CarriedEstimate",
    "Ranking",
    "ScoredPositions",
    "Selection",
    "SelectionConfig",
    "Support",
    "SupportMode",
    "TokenStatistics",
    "concat_statistics",
    "select",
    "statistics_by_support",
    "token_statistics",
]
