"""A replica's responses as the micro-batches that this rank's place in the layout asks for."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_taopd.data.batches import MicroBatch, make_micro_batches
from megatron_taopd.data.records import Rollout
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig


def replica_micro_batches(
    rollouts: Sequence[Rollout],
    parallel: ParallelConfig,
    *,
    micro_batch_size: int,
    sample_offset: int,
    at_least: int = 0,
) -> list[MicroBatch]:
    """This rank's part of its replica's responses.

    Args:
        sample_offset: index of the first response in the global batch.
        at_least: micro-batches.
    """
    return make_micro_batches(
        rollouts,
        micro_batch_size=micro_batch_size,
        sample_offset=sample_offset,
        length_multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
        context_rank=distributed.context_parallel_rank(),
        context_size=distributed.context_parallel_size(),
        at_least=at_least,
    )
