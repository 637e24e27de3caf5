"""The scoring phase: teacher and student read the responses, token statistics come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.errors import ConfigError
from megatron_taopd.fp8_config import ScoreHeadConfig
from megatron_taopd.ops.fp8 import refuse_without_fp8_units
from megatron_taopd.ops.triton_statistics import StatisticsKernel
from megatron_taopd.platform import device, distributed
from megatron_taopd.teachability import (
    Selection,
    SelectionConfig,
    SupportMode,
    TokenStatistics,
    concat_statistics,
    select,
    token_statistics,
)
from megatron_taopd.training.forward import forward_hidden, pick_rows
from megatron_taopd.training.offload import HeldRows
from megatron_taopd.training.pair import ModelPair

Read = TypeVar("Read")
Read_co = TypeVar("Read_co", covariant=True)


class Reader(Protocol[Read_co]):
    """Makes something of a micro-batch's rows from both models' hidden states; last-stage ranks call it together."""

    @property
    def pair(self) -> ModelPair:
        """The models that are read."""

    def __call__(
        self, micro_batch: MicroBatch, student_hidden_RH: torch.Tensor, teacher_hidden_RH: torch.Tensor
    ) -> Read_co:
        """Rows [R, H] of either model."""


@dataclass(kw_only=True)
class ScoredRows:
    """Every response position that this rank predicts, in micro-batch order; exists on last-stage ranks only.

    R rows.
    """

    statistics: TokenStatistics
    """Of R rows, the same on all tensor-parallel ranks."""
    token_ids_R: torch.Tensor
    sample_index_R: torch.Tensor
    """Index of the response in the global batch."""
    position_R: torch.Tensor
    """Position in the response, from 0."""
    rows_per_micro_batch: list[int]
    teacher_per_micro_batch: list[int]


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """Token statistics of a micro-batch's rows from both models' hidden states; last-stage ranks call it together."""

    pair: ModelPair
    support_k: int
    support_mode: SupportMode
    temperature: float
    logits_chunk_bytes: int
    compile_statistics: bool = False
    statistics_kernel: StatisticsKernel = "torch"
    score_head_stages: int = 0
    """0: the models' own heads. 1: heads in FP8. 2: FP8, then the candidates again by the own heads."""

    def __call__(
        self, micro_batch: MicroBatch, student_hidden_RH: torch.Tensor, teacher_hidden_RH: torch.Tensor
    ) -> TokenStatistics:
        exact = (self.pair.student_head(), self.pair.teacher_head(micro_batch.teacher))
        rough = self.pair.fp8_heads(micro_batch.teacher) if self.score_head_stages else None
        return token_statistics(
            student_hidden_RH,
            teacher_hidden_RH,
            micro_batch.token_ids_R,
            *(rough if rough is not None and self.score_head_stages == 1 else exact),
            k=self.support_k,
            temperature=self.temperature,
            support_mode=self.support_mode,
            logits_chunk_bytes=self.logits_chunk_bytes,
            compiled=self.compile_statistics,
            kernel=self.statistics_kernel,
            rough_heads=rough if self.score_head_stages == 2 else None,
        )

    @classmethod
    def from_config(
        cls,
        pair: ModelPair,
        config: SelectionConfig,
        *,
        temperature: float,
        logits_chunk_bytes: int,
        compile_statistics: bool = False,
        statistics_kernel: StatisticsKernel = "torch",
        score_head: ScoreHeadConfig | None = None,
    ) -> RowReader:
        """As the flags of selection say."""
        return cls(
            pair=pair,
            support_k=config.support_k,
            support_mode=config.support_mode,
            temperature=temperature,
            logits_chunk_bytes=logits_chunk_bytes,
            compile_statistics=compile_statistics,
            statistics_kernel=statistics_kernel,
            score_head_stages=0 if score_head is None else score_head.stages,
        )


def check_score_head(config: ScoreHeadConfig, compared: Sequence[str] = ()) -> None:
    """Before models are loaded.

    Args:
        compared: further formats that heads are read in.

    Raises:
        ConfigError: this machine has no FP8 units for an FP8 head.
    """
    if config.stages or "fp8" in compared:
        refuse_without_fp8_units(device())


def refuse_rough_logprobs(reader: RowReader, micro_batches: Sequence[MicroBatch], *, loss: str) -> None:
    """The loss has nothing of an FP8 head, and log-probabilities that were not recorded would come from there.

    Raises:
        ConfigError: as said.
    """
    if loss == "sampled_reverse_kl" and reader.score_head_stages:
        if any(micro_batch.rollout_logprobs_R is None for micro_batch in micro_batches):
            raise ConfigError(
                "--loss sampled_reverse_kl compares with the log-probabilities that responses were sampled with, which "
                "these rollouts have not recorded, and --score-head-precision fp8 would put inexact ones in their "
                "place; use --score-head-precision model, or rollouts with `response_logprobs`"
            )


def read_teacher(pair: ModelPair, micro_batches: Sequence[MicroBatch], *, on_host: bool = False) -> list[HeldRows]:
    """Its teacher's final hidden states of each micro-batch's response rows; an empty list off the last stage.

    Teachers read one after another.

    Args:
        on_host: they wait in host memory.
    """
    rows: dict[int, HeldRows] = {}
    for index, teacher in enumerate(pair.teachers):
        own = [i for i, micro_batch in enumerate(micro_batches) if micro_batch.teacher == index]
        read = teacher.read([micro_batches[i] for i in own], on_host=on_host)
        rows.update(zip(own, read, strict=distributed.is_last_stage()))
    return [rows[i] for i in sorted(rows)]


def score_micro_batches(
    reader: Reader[Read],
    student_modules: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    teacher_rows: Sequence[HeldRows],
) -> list[Read]:
    """What is read of every response position, micro-batch by micro-batch; an empty list off the last stage.

    The student makes a forward pass; its hidden states are held for one micro-batch at a time.
    """

    def score(teacher: Iterator[HeldRows], micro_batch: MicroBatch, hidden_SBH: torch.Tensor) -> Read:
        student_RH = pick_rows(hidden_SBH, micro_batch.row_index_R, reader.pair.student.config)
        return reader(micro_batch, student_RH, next(teacher).read())

    return forward_hidden(student_modules, micro_batches, partial(score, iter(teacher_rows)))


def score_from_rollout(
    reader: RowReader, micro_batches: Sequence[MicroBatch], teacher_rows: Sequence[HeldRows]
) -> list[TokenStatistics]:
    """The same without a forward pass of the student, from the hidden states that the rollout kept. They are let go."""
    parts: list[TokenStatistics] = []
    if not distributed.is_last_stage():
        return parts
    for micro_batch, teacher in zip(micro_batches, teacher_rows, strict=True):
        assert micro_batch.student_hidden_RH is not None, "the rollout keeps hidden states on last-stage ranks"
        parts.append(reader(micro_batch, micro_batch.student_hidden_RH, teacher.read()))
        micro_batch.student_hidden_RH = None
    return parts


def read_in_groups(
    reader: Reader[Read],
    micro_batches: Sequence[MicroBatch],
    *,
    group_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Read]:
    """Read many micro-batches, with the teacher's rows of ``group_size`` of them held at a time.

    Args:
        progress: called with micro-batches done and in all, after each group.

    Returns:
        What was read of each; an empty list off the last stage.
    """
    parts: list[Read] = []
    # Replicas whose shares differ by one may have another number of groups, and all of them read the teacher.
    for start in range(0, distributed.most_of_replicas(len(micro_batches)), group_size):
        group = micro_batches[start : start + group_size]
        teacher_rows = read_teacher(reader.pair, group)
        if group:
            parts += score_micro_batches(reader, reader.pair.student.modules, group, teacher_rows)
        if progress is not None:
            progress(start + len(group), len(micro_batches))
    return parts


def score_in_groups(
    reader: RowReader,
    micro_batches: Sequence[MicroBatch],
    *,
    group_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> ScoredRows | None:
    """Statistics of many micro-batches by :func:`read_in_groups`; None off the last stage."""
    parts = read_in_groups(reader, micro_batches, group_size=group_size, progress=progress)
    return collect_rows(micro_batches, parts)


def collect_rows(micro_batches: Sequence[MicroBatch], parts: Sequence[TokenStatistics]) -> ScoredRows | None:
    """Rows of all micro-batches in order; None off the last stage."""
    if not distributed.is_last_stage():
        return None
    return ScoredRows(
        statistics=concat_statistics(parts),
        token_ids_R=torch.cat([m.token_ids_R for m in micro_batches]),
        sample_index_R=torch.cat([m.sample_index_R for m in micro_batches]),
        position_R=torch.cat([m.position_R for m in micro_batches]),
        rows_per_micro_batch=[m.token_ids_R.numel() for m in micro_batches],
        teacher_per_micro_batch=[m.teacher for m in micro_batches],
    )


def select_rows(scored: ScoredRows, config: SelectionConfig, *, seed: int, step: int) -> Selection:
    """Scores and keep mask over the rollout batch of all replicas; last-stage ranks call it together."""
    return select(
        scored.statistics,
        sample_index_R=scored.sample_index_R,
        position_R=scored.position_R,
        config=config,
        group=distributed.row_group(),
        sample_group=distributed.context_parallel_group(),
        seed=seed,
        step=step,
    )
