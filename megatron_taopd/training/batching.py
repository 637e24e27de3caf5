"""A replica's responses as the micro-batches that this rank's place in the layout asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_taopd.data.batches import MicroBatch, context_multiple, make_micro_batches, sequence_length
from megatron_taopd.data.packing import pack_micro_batches, padding_like
from megatron_taopd.data.records import Rollout
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.run_config import PackingConfig


def replica_micro_batches(
    rollouts: Sequence[Rollout],
    parallel: ParallelConfig,
    packing: PackingConfig,
    *,
    micro_batch_size: int,
    sample_offset: int,
    teacher_names: Sequence[str | None],
    alignment: int = 1,
) -> list[MicroBatch]:
    """This rank's part of its replica's responses, padded or packed; all ranks call it together.

    Replicas that share experts get the same number of micro-batches, and virtual pipeline stages a multiple of the
    stages: those beyond the responses are padding without rows.

    Args:
        micro_batch_size: responses a micro-batch; with packing a micro-batch has as many tokens as so many of the
            longest, unless ``packing`` says how many.
        sample_offset: index of the first response in the global batch.
        teacher_names: of all teachers, in the order in which they read; each has micro-batches of its own.
        alignment: tokens of a sequence on a rank are a multiple of it, as FP8 layers want in training.

    Raises:
        DataError: a response is too long to be packed.
    """
    context_size = distributed.context_parallel_size()
    length_multiple = alignment * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    place: dict[str, Any] = dict(
        sample_offset=sample_offset,
        length_multiple=length_multiple,
        context_rank=distributed.context_parallel_rank(),
        context_size=context_size,
        teachers=[teacher_of(rollout, teacher_names) for rollout in rollouts],
    )
    if packing.packed_sequences:
        multiple = context_multiple(context_size) * length_multiple
        longest = -(-max(map(sequence_length, rollouts)) // multiple) * multiple
        max_length = packing.max_packed_length or micro_batch_size * longest
        micro_batches = pack_micro_batches(rollouts, max_length=max_length, **place)
    else:
        micro_batches = make_micro_batches(rollouts, micro_batch_size=micro_batch_size, **place)
    stages = 1 if parallel.num_virtual_stages_per_pipeline_rank is None else parallel.pipeline_model_parallel_size
    for teacher in range(len(teacher_names)):
        own = sum(micro_batch.teacher == teacher for micro_batch in micro_batches)
        wanted = distributed.most_of_replicas(own) if parallel.shares_experts else own
        missing = -(-wanted // stages) * stages - own
        micro_batches += [replace(padding_like(micro_batches[0]), teacher=teacher) for _ in range(missing)]
    micro_batches.sort(key=lambda micro_batch: micro_batch.teacher)
    return micro_batches


def teacher_of(rollout: Rollout, names: Sequence[str | None]) -> int:
    """Index of the teacher that a response is for; readers of files have checked that it has one."""
    return names.index(rollout.extra["teacher"]) if len(names) > 1 else 0
