"""The Megatron optimizer and its learning-rate schedule, from flags spelled as in Megatron."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_taopd.errors import ConfigError
from megatron_taopd.run_config import OptimizationConfig


def build_optimizer(
    config: OptimizationConfig, model_chunks: Sequence[DistributedDataParallel], *, bf16: bool
) -> MegatronOptimizer:
    """Megatron's optimizer over DDP-wrapped chunks; with ``bf16`` it keeps fp32 main weights."""
    model = model_chunks[0].config
    fp8_recipe = model.fp8_recipe if model.fp8 else None
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer=config.optimizer,
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            sgd_momentum=config.sgd_momentum,
            # Infinity computes and reports the norm without ever clipping; 0 would skip the norm.
            clip_grad=config.clip_grad or math.inf,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=config.use_distributed_optimizer,
            fp8_recipe=fp8_recipe,
        ),
        list(model_chunks),
    )


def build_scheduler(
    config: OptimizationConfig, optimizer: MegatronOptimizer, *, train_iters: int, global_batch_size: int
) -> OptimizerParamScheduler:
    """Megatron's schedule, counted in samples as Megatron counts it.

    Raises:
        ConfigError: the warm-up is as long as the decay or longer.
    """
    decay_iters = config.lr_decay_iters or train_iters
    if config.lr_warmup_iters >= decay_iters:
        raise ConfigError(
            f"--lr-warmup-iters {config.lr_warmup_iters} must be below the {decay_iters} iterations of the decay "
            "(--lr-decay-iters, or --train-iters); shorten the warm-up"
        )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters * global_batch_size,
        lr_decay_steps=decay_iters * global_batch_size,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=train_iters * global_batch_size,
        wd_incr_style="constant",
        # A resumed run follows its own command line, so that it can be prolonged.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
