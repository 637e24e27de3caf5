"""Scores, regions and kept positions of a bank, by the selectors and the ranking that training uses. N positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import numpy as np
import torch

from megatron_taopd.diagnostics.bank import Bank
from megatron_taopd.ops.order import distributed_quantiles, first_n
from megatron_taopd.teachability import SELECTORS, SelectionConfig, SupportMode
from megatron_taopd.teachability.ranking import RankedRows, rank_rows
from megatron_taopd.teachability.selection import keep_budget
from megatron_taopd.teachability.selectors import USES_COMPATIBILITY

Scale = Literal["quantile", "raw"]

SCORES = (
    "teachability",
    "teachability_entropy",
    "incompatible",
    "entropy",
    "divergence",
    "compatibility",
    "tip",
    "prefix",
)
"""Selectors whose scores are cut into quartiles and terciles."""

LABELS = {
    "teachability": "D̃·C̃",
    "teachability_entropy": "H̃ or D̃·C̃",
    "incompatible": "D̃·(1−C̃)",
    "entropy": "H̃",
    "divergence": "D̃",
    "compatibility": "C̃",
    "tip": "H̃ or D̃",
    "prefix": "earlier position",
    "q3_teachability": "D̃·C̃ in Q3",
    "random": "random",
    "full": "all",
    "learnable": "D̃·C̃",
    "position": "position",
    "teacher_entropy": "teacher entropy",
    "entropy_x_divergence": "H̃·D̃",
    "all": "all positions",
    "q3": "Q3: H̃ low, D̃ high",
}
"""For people: scores, selectors, terms and regions."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A bank ranked by one selector at one K."""

    selector: str
    support_k: int
    support_mode: SupportMode
    compatibility_scale: Scale | None
    """None: the score has no C."""
    rows: RankedRows

    @property
    def score(self) -> np.ndarray:
        """float64 [N]."""
        return self.rows.score.numpy()

    def keep(self, keep_ratio: float) -> np.ndarray:
        """Mask of the ceil(ratio x N) first positions, without a minimum a response: budgets are matched."""
        budget = keep_budget(keep_ratio, len(self.rows.score))
        return first_n(self.rows.order_keys, budget, None).numpy()


class Scores:
    """A bank as selectors see it; ranks once for each question."""

    def __init__(self, bank: Bank, *, seed: int) -> None:
        self.bank = bank
        self.seed = seed
        self.ranked = cache(self._ranked)

    def _ranked(
        self, selector: str, support_k: int, support_mode: SupportMode = "exact", scale: Scale = "quantile"
    ) -> Ranked:
        """Rank with a selector; ``scale`` is how C enters its score, if it does."""
        uses_scale = selector not in SELECTORS or selector in USES_COMPATIBILITY
        sample_index, position = self.bank.places()
        rows = rank_rows(
            self.bank.statistics(support_k, support_mode),
            sample_index_R=sample_index,
            position_R=position,
            config=SelectionConfig(
                selector=selector,
                support_k=support_k,
                support_mode=support_mode,
                compatibility_scale=scale if uses_scale else None,
            ),
            quantiles=partial(distributed_quantiles, group=None),
            seed=self.seed,
            step=0,
        )
        return Ranked(
            selector=selector,
            support_k=support_k,
            support_mode=support_mode,
            compatibility_scale=scale if uses_scale else None,
            rows=rows,
        )

    def regions(self, support_k: int) -> dict[str, np.ndarray]:
        """Masks [N]: ``all``; ``q3``, where H̃ is below and D̃ at or above its median."""
        inside = self.ranked("q3_teachability", support_k).score >= 0
        return {"all": np.ones_like(inside), "q3": inside}

    def terms(self, support_k: int, support_mode: SupportMode, scale: Scale) -> dict[str, np.ndarray]:
        """What regressions are made of, float64 [N]."""
        rows = self.ranked("teachability", support_k, support_mode).rows
        h, d, c = (values.numpy() for values in (rows.H_norm, rows.D_norm, rows.C_norm))
        if scale == "raw":
            c = self.bank.statistics(support_k, support_mode).C.double().numpy()
        return {
            "entropy": h,
            "divergence": d,
            "compatibility": c,
            "learnable": d * c,
            "incompatible": d * (1 - c),
            "entropy_x_divergence": h * d,
            "position": self.bank.positions["position"].astype(np.float64),
            "teacher_entropy": self.bank.positions["teacher_entropy"].astype(np.float64),
        }


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Share of one mask's positions that are in another of the same size."""
    return float((one & other).sum() / max(one.sum(), 1))


def kept_overlap(one: Ranked, other: Ranked, keep_ratios: Sequence[float]) -> list[dict[str, float]]:
    """How far two rankings keep the same positions at each budget."""
    return [{"keep_ratio": ratio, "overlap": overlap(one.keep(ratio), other.keep(ratio))} for ratio in keep_ratios]


def as_numpy(values: torch.Tensor) -> np.ndarray:
    """float64, for statistics."""
    return values.double().numpy()
