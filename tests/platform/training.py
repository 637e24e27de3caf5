"""Runs in the ranks: training steps of next-token prediction through Megatron's schedule and optimizer."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_taopd.models import LoadedModel
from megatron_taopd.platform import distributed

BATCH, LENGTH, MICRO_BATCHES = 2, 16, 4
"""Samples of a micro-batch, tokens of a sample, micro-batches of a step over all replicas."""


def samples(vocab_size: int) -> torch.Tensor:
    """Token ids [MICRO_BATCHES, BATCH, LENGTH + 1], the same everywhere."""
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, vocab_size, (MICRO_BATCHES, BATCH, LENGTH + 1), generator=generator)


def prepare(
    loaded: LoadedModel,
    *,
    optimizer: str,
    lr: float,
    distributed_optimizer: bool,
    clip_grad: float = math.inf,
) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    """DDP around the module and Megatron's optimizer over it."""
    loaded.config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallel(
        loaded.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer),
        loaded.module,
    )
    bf16 = loaded.config.params_dtype == torch.bfloat16
    config = OptimizerConfig(
        optimizer=optimizer,
        lr=lr,
        weight_decay=0.0,
        sgd_momentum=0.0,
        clip_grad=clip_grad,
        bf16=bf16,
        params_dtype=loaded.config.params_dtype,
        use_distributed_optimizer=distributed_optimizer,
    )
    return ddp, get_megatron_optimizer(config, [ddp])


def train_step(
    loaded: LoadedModel, ddp: DistributedDataParallel, optimizer: MegatronOptimizer
) -> tuple[float | None, float]:
    """One step on :func:`samples`.

    Returns:
        Mean loss a token over this replica's micro-batches (None off the last stage) and the gradient norm.
    """
    mine = samples(loaded.hf.vocab_size)[distributed.data_parallel_rank() :: distributed.data_parallel_size()]

    def loss_of(labels_BS: torch.Tensor, hidden_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        logits_SBV, _ = loaded.module.output_layer(hidden_SBH, weight=loaded.module.head_weight())
        loss = vocab_parallel_cross_entropy(logits_SBV.float(), labels_BS.T.contiguous()).sum()
        return loss, torch.tensor(labels_BS.numel(), dtype=torch.int), {"loss": loss.detach()}

    def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        tokens = next(iterator)
        positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
        return model(tokens[:, :-1], positions, None), partial(loss_of, tokens[:, 1:])

    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(mine),
        model=ddp,
        num_microbatches=len(mine),
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    updated, grad_norm, _ = optimizer.step()
    assert updated
    if not distributed.is_last_stage():
        return None, grad_norm
    return float(sum(report["loss"] for report in reports)) / mine[..., 1:].numel(), grad_norm
