"""How a step's kept positions are found: before the training forward over the whole batch, or inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from megatron_taopd.config import TrainConfig
from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.teachability import Selection, SelectionConfig
from megatron_taopd.training.pair import ModelPair, can_offload
from megatron_taopd.training.scoring import (
    RowReader,
    ScoredRows,
    collect_rows,
    read_teacher,
    refuse_rough_logprobs,
    score_from_rollout,
    score_micro_batches,
    select_rows,
)
from megatron_taopd.training.step import TrainMicroBatch, keep_targets


@dataclass(kw_only=True)
class Outcome:
    """What a step scored and kept on this rank; None off the last stage."""

    scored: ScoredRows | None
    selection: Selection | None
    asked: SelectionConfig
    """What chose the positions of this step, on every rank."""
    student_scoring_forwards: int
    """Forward passes over the batch that the student made for scoring alone."""
    phase: dict[str, float] = field(default_factory=dict)
    """Metrics that tell, on every rank, which selector was in force, where that can change."""


class SelectionScope(Protocol):
    """Called by every rank around the training forward of a step."""

    def before(self, micro_batches: Sequence[MicroBatch], *, step: int) -> list[TrainMicroBatch]:
        """Ahead of the training forward: micro-batches with targets, or with what makes them."""

    def after(self, *, step: int) -> Outcome:
        """Behind the optimizer step."""

    def observe(self, outcome: Outcome, *, step: int) -> None:
        """Instead of ``before`` and ``after``: learn from a step whose positions another scope has chosen."""

    def state(self) -> dict[str, Any]:
        """Plain values that a checkpoint keeps, the same on every rank; empty where nothing outlives a step."""


class GlobalScope:
    """Both models read the batch, then quantiles and budget are taken over all of it."""

    def __init__(
        self, config: TrainConfig, pair: ModelPair, student: Sequence[torch.nn.Module], *, temperature: float
    ) -> None:
        self.config = config
        self.pair = pair
        self.student = student
        self.reader = RowReader.from_config(
            pair,
            config.selection,
            temperature=temperature,
            logits_chunk_bytes=config.scoring.logits_chunk_bytes,
            compile_statistics=config.scoring.compile_statistics,
            statistics_kernel=config.scoring.statistics_kernel,
            score_head=config.score_head,
        )
        self.rows_on_host = config.scoring.offload_teacher_hidden and can_offload("--offload-teacher-hidden")
        self.outcome: Outcome | None = None

    def before(self, micro_batches: Sequence[MicroBatch], *, step: int) -> list[TrainMicroBatch]:
        refuse_rough_logprobs(self.reader, micro_batches, loss=self.config.loss.loss)
        teacher_rows = read_teacher(self.pair, micro_batches, on_host=self.rows_on_host)
        from_rollout = self.config.scoring.score_from == "rollout"
        if from_rollout:
            parts = score_from_rollout(self.reader, micro_batches, teacher_rows)
        else:
            parts = score_micro_batches(self.reader, self.student, micro_batches, teacher_rows)
        scored, selection = collect_rows(micro_batches, parts), None
        if scored is not None:
            selection = select_rows(scored, self.config.selection, seed=self.config.seed, step=step)
        self.outcome = Outcome(
            scored=scored,
            selection=selection,
            asked=self.config.selection,
            student_scoring_forwards=int(not from_rollout),
        )
        if scored is None or selection is None:
            return [TrainMicroBatch(tokens=micro_batch) for micro_batch in micro_batches]
        keeps = selection.keep.split(scored.rows_per_micro_batch)
        return [
            TrainMicroBatch(
                tokens=micro_batch,
                targets=keep_targets(micro_batch, keep, part.student_logprob, teacher, self.config.loss),
            )
            for micro_batch, keep, part, teacher in zip(micro_batches, keeps, parts, teacher_rows, strict=True)
        ]

    def after(self, *, step: int) -> Outcome:
        assert self.outcome is not None, "after() follows before()"
        outcome, self.outcome = self.outcome, None
        return outcome

    def observe(self, outcome: Outcome, *, step: int) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}
