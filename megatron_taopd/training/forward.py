"""Where models are called and rows of their hidden states picked; a pass without gradient through Megatron's
schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig

from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.ops.rows import gather_rows
from megatron_taopd.platform import distributed, progress

Result = TypeVar("Result")


def call_model(module: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """This stage's output for a micro-batch: on the last stage final hidden states [S (/TP under SP), B, H]."""
    progress.beat()
    packed = _packed_params(micro_batch)
    return module(micro_batch.tokens_BS, micro_batch.position_ids_BS, None, packed_seq_params=packed)


def _packed_params(micro_batch: MicroBatch) -> PackedSeqParams | None:
    """How Megatron is told where packed sequences end."""
    ends = micro_batch.packed_ends
    if ends is None:
        return None
    longest = int(ends.diff().max())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )


def pick_rows(hidden_SBH: torch.Tensor, row_index_R: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """Rows [R, H] of final hidden states, replicated over the tensor-parallel ranks.

    Args:
        row_index_R: as in :class:`MicroBatch`, any part of it.
        config: of the model that made the hidden states.
    """
    return gather_rows(
        hidden_SBH,
        row_index_R,
        group=distributed.tensor_parallel_group(),
        sequence_parallel=config.sequence_parallel,
    )


def run_schedule(
    forward_step: Callable[..., Any],
    modules: Sequence[torch.nn.Module],
    micro_batches: Sequence[Any],
    first: MicroBatch,
    **options: Any,
) -> list[Any]:
    """Megatron's schedule for this layout over micro-batches, all shaped like ``first``.

    Args:
        modules: this rank's part of a model; each virtual stage reads all micro-batches.
    """
    virtual = len(modules) > 1
    iterators = [iter(micro_batches) for _ in modules]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if virtual else iterators[0],
        model=list(modules) if virtual else modules[0],
        num_microbatches=len(micro_batches),
        seq_length=first.length,
        micro_batch_size=first.tokens_BS.shape[0],
        **options,
    )


def forward_hidden(
    modules: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    consume: Callable[[MicroBatch, torch.Tensor], Result],
) -> list[Result]:
    """Run every micro-batch through all pipeline stages and hand each one's final hidden states to ``consume``.

    Args:
        modules: this rank's part of a model; the last stage answers hidden states [S (/TP under SP), B, H].
        micro_batches: this replica's micro-batches, all of one shape.
        consume: called on the last stage as each micro-batch arrives; it keeps what it needs, so that hidden
            states of one micro-batch are held at a time.

    Returns:
        What ``consume`` returned, micro-batch by micro-batch, on the last stage; an empty list elsewhere.
    """

    def finish(micro_batch: MicroBatch, hidden_SBH: torch.Tensor, *, non_loss_data: bool) -> Result:
        return consume(micro_batch, hidden_SBH)

    def forward_step(data_iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        micro_batch = next(data_iterator)
        return call_model(model, micro_batch), partial(finish, micro_batch)

    with torch.no_grad():
        return run_schedule(
            forward_step, modules, micro_batches, micro_batches[0], forward_only=True, collect_non_loss_data=True
        )
