"""The scoring phase: teacher and student read the responses, token statistics come out, a keep mask is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.ops.rows import gather_rows
from megatron_taopd.platform import distributed
from megatron_taopd.teachability import (
    Selection,
    SelectionConfig,
    TokenStatistics,
    concat_statistics,
    select,
    token_statistics,
)
from megatron_taopd.training.forward import forward_hidden
from megatron_taopd.training.pair import ModelPair


@dataclass(kw_only=True)
class ScoredRows:
    """Every response position of this replica, in micro-batch order; exists on last-stage ranks only.

    R rows, H hidden size of the teacher.
    """

    statistics: TokenStatistics
    """Of R rows, the same on all tensor-parallel ranks."""
    token_ids_R: torch.Tensor
    sample_index_R: torch.Tensor
    """Index of the response in the global batch."""
    position_R: torch.Tensor
    """Position in the response, from 0."""
    rows_per_micro_batch: list[int]
    teacher_hidden: list[torch.Tensor]
    """Final hidden states [R_i, H] of each micro-batch's rows; empty where they were not asked for."""


def score_micro_batches(
    pair: ModelPair,
    student_module: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    *,
    config: SelectionConfig,
    temperature: float,
    logits_chunk_bytes: int,
    keep_teacher_hidden: bool,
    group_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ScoredRows | None:
    """Token statistics of every response position of this replica's micro-batches.

    The teacher goes first and leaves hidden states [rows, H]; the student's are consumed micro-batch by micro-batch.

    Args:
        group_size: micro-batches a pass through both models (default: all in one). Without
            ``keep_teacher_hidden`` this bounds the teacher's hidden states that are held.
        progress: called with micro-batches done and in all, after each group.

    Returns:
        The scored rows on last-stage ranks, None on the others.
    """
    group_size = group_size or len(micro_batches)
    parts: list[TokenStatistics] = []
    kept_hidden: list[torch.Tensor] = []

    def statistics(
        teacher_rows: Iterator[torch.Tensor], micro_batch: MicroBatch, hidden_SBH: torch.Tensor
    ) -> TokenStatistics:
        return token_statistics(
            _rows(micro_batch, hidden_SBH, pair.student.config.sequence_parallel),
            next(teacher_rows),
            micro_batch.token_ids_R,
            pair.student_head(),
            pair.teacher_head(),
            k=config.support_k,
            temperature=temperature,
            support_mode=config.support_mode,
            logits_chunk_bytes=logits_chunk_bytes,
        )

    for start in range(0, len(micro_batches), group_size):
        group = micro_batches[start : start + group_size]
        teacher_hidden = forward_hidden(
            pair.teacher.module,
            group,
            lambda micro_batch, hidden_SBH: _rows(micro_batch, hidden_SBH, pair.teacher.config.sequence_parallel),
        )
        parts += forward_hidden(student_module, group, partial(statistics, iter(teacher_hidden)))
        if keep_teacher_hidden:
            kept_hidden += teacher_hidden
        if progress is not None:
            progress(start + len(group), len(micro_batches))
    if not distributed.is_last_stage():
        return None
    return ScoredRows(
        statistics=concat_statistics(parts),
        token_ids_R=torch.cat([m.token_ids_R for m in micro_batches]),
        sample_index_R=torch.cat([m.sample_index_R for m in micro_batches]),
        position_R=torch.cat([m.position_R for m in micro_batches]),
        rows_per_micro_batch=[m.token_ids_R.numel() for m in micro_batches],
        teacher_hidden=kept_hidden,
    )


def _rows(micro_batch: MicroBatch, hidden_SBH: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
    return gather_rows(
        hidden_SBH,
        micro_batch.row_index_R,
        group=distributed.tensor_parallel_group(),
        sequence_parallel=sequence_parallel,
    )


def select_rows(scored: ScoredRows, config: SelectionConfig, *, seed: int, step: int) -> Selection:
    """Scores and keep mask over the rollout batch of all data-parallel replicas; last-stage ranks call it together."""
    return select(
        scored.statistics,
        sample_index_R=scored.sample_index_R,
        position_R=scored.position_R,
        config=config,
        group=distributed.data_parallel_group(),
        seed=seed,
        step=step,
    )
