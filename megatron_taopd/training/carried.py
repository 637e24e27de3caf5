"""Selection inside the training forward, by what earlier steps left behind or by place: the student reads the batch
once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from megatron_taopd.config import TrainConfig
from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.platform import distributed
from megatron_taopd.teachability import CarriedEstimate, Selection, TokenStatistics
from megatron_taopd.teachability.carried import (
    keep_by_estimate,
    keep_without_statistics,
    select_by_estimate,
    update_estimate,
)
from megatron_taopd.teachability.overlap import agreement
from megatron_taopd.teachability.selectors import READS_NO_STATISTICS
from megatron_taopd.training.forward import pick_rows
from megatron_taopd.training.offload import HeldRows
from megatron_taopd.training.scopes import GlobalScope, Outcome
from megatron_taopd.training.scoring import ScoredRows, collect_rows, read_teacher, refuse_rough_logprobs, select_rows
from megatron_taopd.training.step import KeptTargets, TrainMicroBatch, keep_targets

logger = logging.getLogger(__name__)


class CarriedScope:
    """``--selection-scope carried`` (:mod:`megatron_taopd.teachability.carried`); selectors that read no statistics.

    The teacher reads the batch first. In the training forward the loss function scores a micro-batch's rows without
    gradient and keeps those above the carried cut. After the step the estimate moves towards this batch. A run without
    an estimate makes its first step as ``global``. Selectors that read no statistics are exact and carry nothing: what
    they keep and the loss are those of a ``global`` step, whichever scope was asked for.
    """

    def __init__(self, exact: GlobalScope, saved: dict[str, Any]) -> None:
        """Start with an estimate saved by :meth:`state`, or without."""
        self.exact = exact
        self.config: TrainConfig = exact.config
        self.carries = self.config.selection.selector not in READS_NO_STATISTICS
        self.estimate = self._restore(saved.get("carried")) if self.carries else None
        self.micro_batches: list[MicroBatch] = []
        self.parts: list[TokenStatistics] = []

    def before(self, micro_batches: Sequence[MicroBatch], *, step: int) -> list[TrainMicroBatch]:
        self.micro_batches, self.parts = list(micro_batches), []
        if self.carries and self.estimate is None:
            return self.exact.before(micro_batches, step=step)
        refuse_rough_logprobs(self.exact.reader, micro_batches, loss=self.config.loss.loss)
        teacher_rows = read_teacher(self.exact.pair, micro_batches, on_host=self.exact.rows_on_host)
        if not distributed.is_last_stage():
            return [TrainMicroBatch(tokens=micro_batch) for micro_batch in micro_batches]
        keeps = [None] * len(micro_batches) if self.carries else self._keeps_by_place(step)
        return [
            TrainMicroBatch(tokens=micro_batch, choose=partial(self._choose, step, micro_batch, teacher, keep))
            for micro_batch, teacher, keep in zip(micro_batches, teacher_rows, keeps, strict=True)
        ]

    def after(self, *, step: int) -> Outcome:
        if self.carries and self.estimate is None:
            outcome = self.exact.after(step=step)
        else:
            outcome = self._collect(step)
        self.observe(outcome, step=step)
        return outcome

    def observe(self, outcome: Outcome, *, step: int) -> None:
        if self.carries:
            self._update(outcome.scored, step)

    def state(self) -> dict[str, Any]:
        if self.estimate is None:
            return {}
        return {"carried": {"settings": self._settings(), "estimate": self.estimate.as_dict()}}

    def _choose(
        self,
        step: int,
        micro_batch: MicroBatch,
        teacher: HeldRows,
        keep_R: torch.Tensor | None,
        hidden_SBH: torch.Tensor,
    ) -> KeptTargets:
        """Targets of a micro-batch from the student's hidden states; called on the last stage, in order."""
        student_RH = pick_rows(hidden_SBH, micro_batch.row_index_R, self.exact.pair.student.config)
        statistics = self.exact.reader(micro_batch, student_RH, teacher.read())
        self.parts.append(statistics)
        if keep_R is None:
            assert self.estimate is not None, "without an estimate the first step is global"
            _, keep_R = keep_by_estimate(
                self.estimate,
                statistics,
                sample_index_R=micro_batch.sample_index_R,
                position_R=micro_batch.position_R,
                config=self.config.selection,
                sample_group=distributed.context_parallel_group(),
                seed=self.config.seed,
                step=step,
            )
        return keep_targets(micro_batch, keep_R, statistics.student_logprob, teacher, self.config.loss)

    def _keeps_by_place(self, step: int) -> list[torch.Tensor]:
        """The keep mask of each micro-batch for a selector that reads no statistics."""
        keep = keep_without_statistics(
            torch.cat([m.sample_index_R for m in self.micro_batches]),
            torch.cat([m.position_R for m in self.micro_batches]),
            config=self.config.selection,
            group=distributed.row_group(),
            sample_group=distributed.context_parallel_group(),
            seed=self.config.seed,
            step=step,
        )
        return list(keep.split([m.position_R.numel() for m in self.micro_batches]))

    def _collect(self, step: int) -> Outcome:
        """What the loss function scored and kept, as one selection with the figures of the batch."""
        scored = collect_rows(self.micro_batches, self.parts)
        selection = None if scored is None else self._selection(scored, step)
        return Outcome(scored=scored, selection=selection, asked=self.config.selection, student_scoring_forwards=0)

    def _selection(self, scored: ScoredRows, step: int) -> Selection:
        settings = self.config.selection
        if self.estimate is None:  # by place, which is exact
            return select_rows(scored, settings, seed=self.config.seed, step=step)
        group = distributed.row_group()
        selection = select_by_estimate(
            self.estimate,
            scored.statistics,
            sample_index_R=scored.sample_index_R,
            position_R=scored.position_R,
            config=settings,
            group=group,
            sample_group=distributed.context_parallel_group(),
            seed=self.config.seed,
            step=step,
        )
        interval = settings.carried_agreement_interval
        if interval is not None and (step + 1) % interval == 0:
            exact = select_rows(scored, settings, seed=self.config.seed, step=step)
            selection.summary["carried_agreement"] = agreement(selection.keep, exact.keep, group)
        return selection

    def _update(self, scored: ScoredRows | None, step: int) -> None:
        """Move the estimate on the last stage and tell the other stages, whose checkpoints hold it too."""
        estimate = None
        if scored is not None:
            estimate = update_estimate(
                self.estimate,
                scored.statistics,
                sample_index_R=scored.sample_index_R,
                position_R=scored.position_R,
                config=self.config.selection,
                group=distributed.row_group(),
                seed=self.config.seed,
                step=step,
            )
        self.estimate = distributed.tell_from_last_stage(estimate)

    def _settings(self) -> dict[str, Any]:
        """What the numbers of an estimate depend on."""
        selection = self.config.selection
        return {
            "selector": selection.selector,
            "keep_ratio": selection.resolved_keep_ratio,
            "support_k": selection.support_k,
            "support_mode": selection.support_mode,
            "entropy_support": selection.entropy_support,
            "compatibility_scale": selection.compatibility_scale or "quantile",
            "temperature": self.exact.reader.temperature,
        }

    def _restore(self, saved: dict[str, Any] | None) -> CarriedEstimate | None:
        if saved is None:
            return None
        if saved["settings"] != self._settings():
            logger.warning(
                "the checkpoint's carried quantiles are of %s and this run has %s: its first step is global",
                saved["settings"],
                self._settings(),
            )
            return None
        return CarriedEstimate(**saved["estimate"])
