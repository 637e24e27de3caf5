"""What a step tells about its selection beside the loss, and the warnings that follow from it."""

from __future__ import annotations

import logging

from megatron_taopd.config import TrainConfig
from megatron_taopd.platform import distributed
from megatron_taopd.teachability.figures import batch_figures
from megatron_taopd.teachability.overlap import overlaps
from megatron_taopd.teachability.selection import TEACHER_TOP
from megatron_taopd.training.pair import ModelPair
from megatron_taopd.training.scopes import Outcome

logger = logging.getLogger(__name__)

LOW_DISAGREEMENT = 0.95
SMALL_SPREAD = 0.01


class Monitor:
    """Figures of every step (docs/metrics.md has the meaning of each)."""

    def __init__(self, config: TrainConfig, pair: ModelPair) -> None:
        self.config = config
        self.stop_ids = pair.student.hf.eos_token_ids
        self.warned: set[str] = set()

    def figures(self, outcome: Outcome, *, iteration: int) -> dict[str, float]:
        """Of what was scored and kept, the same on all last-stage ranks, which call it together; empty elsewhere."""
        scored, selection, asked = outcome.scored, outcome.selection, outcome.asked
        if scored is None or selection is None:
            return {}
        group = distributed.row_group()
        figures = batch_figures(
            scored.statistics,
            keep_R=selection.keep,
            position_R=scored.position_R,
            token_ids_R=scored.token_ids_R,
            stop_ids=self.stop_ids,
            entropy_support=asked.entropy_support,
            group=group,
        )
        monitor = self.config.monitor
        if asked.selector != "full" and monitor.compares(iteration):
            found = overlaps(
                scored.statistics,
                selection.keep,
                monitor.selectors_beside(asked.selector),
                sample_index_R=scored.sample_index_R,
                position_R=scored.position_R,
                config=asked,
                group=group,
                sample_group=distributed.context_parallel_group(),
                seed=self.config.seed,
                step=iteration - 1,
            )
            figures |= {f"kept_overlap/{name}": value for name, value in found.items()}
        return figures

    def warn(self, metrics: dict[str, float]) -> None:
        """Say once, when it begins, that the scores of a run mean little; every rank calls it with the same metrics."""
        self._warn(
            "low disagreement",
            metrics["teacher_top5_share"] >= LOW_DISAGREEMENT,
            "iteration %d: %.2f%% of the sampled tokens are among the teacher's best %d: student and teacher hardly "
            "disagree. A small --keep-ratio has fallen far behind --selector full in such runs; compare the two, or "
            "set --fallback-selector full",
            metrics["iteration"],
            100 * metrics["teacher_top5_share"],
            min(TEACHER_TOP, self.config.selection.support_k),
        )
        spread = metrics.get("C_q95", 1.0) - metrics.get("C_q05", 0.0)
        self._warn(
            "small spread of C",
            spread < SMALL_SPREAD and self.config.selection.scales_compatibility,
            "iteration %d: the 5 %% and 95 %% quantiles of C differ by %.2g, and --compatibility-scale quantile "
            "stretches this to 0 and 1; with raw a difference counts as what it is",
            metrics["iteration"],
            spread,
        )

    def _warn(self, what: str, holds: bool, message: str, *values: float) -> None:
        if holds and what not in self.warned:
            logger.warning(message, *values)
        (self.warned.add if holds else self.warned.discard)(what)
