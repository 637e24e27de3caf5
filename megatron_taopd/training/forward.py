"""A forward pass over micro-batches through Megatron's schedule, without gradient, ending in hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_taopd.data.batches import MicroBatch

Result = TypeVar("Result")


def forward_hidden(
    module: torch.nn.Module,
    micro_batches: Sequence[MicroBatch],
    consume: Callable[[MicroBatch, torch.Tensor], Result],
) -> list[Result]:
    """Run every micro-batch through all pipeline stages and hand each one's final hidden states to ``consume``.

    Args:
        module: the model of this rank; its last stage answers hidden states [S (/TP under SP), B, H].
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
        hidden_SBH = model(micro_batch.tokens_BS, micro_batch.position_ids_BS, None)
        return hidden_SBH, partial(finish, micro_batch)

    batch, length = micro_batches[0].tokens_BS.shape
    with torch.no_grad():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=module,
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=batch,
            forward_only=True,
            collect_non_loss_data=True,
        )
