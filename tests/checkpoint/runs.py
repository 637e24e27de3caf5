"""Runs in the ranks: a tiny training run that can be saved, resumed and asked for all of its state."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_taopd.checkpoint import LoadedState, load_checkpoint, save_checkpoint
from megatron_taopd.models.build import LoadedModel, load_model
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig

LENGTH, MICRO_BATCHES = 8, 2


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A run: layout and optimizer."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    sp: bool = False
    optimizer: str = "adam"
    bf16: bool = False
    distributed_optimizer: bool = False
    padded_vocab_size: int = 512
    lr: float = 1e-2
    seed: int = 1


class Run:
    """Model, optimizer and schedule on this rank."""

    def __init__(self, source: Path, kind: Kind) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        parallel = ParallelConfig(
            tensor_model_parallel_size=kind.tp,
            pipeline_model_parallel_size=kind.pp,
            expert_model_parallel_size=kind.ep,
            expert_tensor_parallel_size=kind.etp,
            sequence_parallel=kind.sp,
        )
        distributed.initialize(parallel, seed=kind.seed)
        dtype = torch.bfloat16 if kind.bf16 else torch.float32
        self.loaded: LoadedModel = load_model(
            source, parallel, params_dtype=dtype, padded_vocab_size=kind.padded_vocab_size, trainable=True
        )
        self.loaded.config.finalize_model_grads_func = finalize_model_grads
        self.module = DistributedDataParallel(
            self.loaded.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=kind.distributed_optimizer
            ),
            self.loaded.module,
        )
        config = OptimizerConfig(
            optimizer=kind.optimizer,
            lr=kind.lr,
            min_lr=0.0,
            weight_decay=0.1,
            sgd_momentum=0.9,
            bf16=kind.bf16,
            params_dtype=dtype,
            use_distributed_optimizer=kind.distributed_optimizer,
        )
        self.optimizer = get_megatron_optimizer(config, [self.module])
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=kind.lr,
            min_lr=0.0,
            lr_warmup_steps=2,
            lr_decay_steps=20,
            lr_decay_style="linear",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=20,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )

    def steps(self, first: int, count: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of each step; the batch of a step is the same on any layout."""
        return [self._step(number) for number in range(first, first + count)]

    def _step(self, number: int) -> tuple[float, float]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        generator = torch.Generator().manual_seed(number)
        vocab = self.loaded.hf.vocab_size
        tokens = torch.randint(0, vocab, (MICRO_BATCHES, 1, LENGTH + 1), generator=generator)
        mine = tokens[distributed.data_parallel_rank() :: distributed.data_parallel_size()]
        self.module.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(mine),
            model=self.module,
            num_microbatches=len(mine),
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        loss = torch.tensor(float(sum(report["loss"] for report in reports)))
        torch.distributed.all_reduce(loss)
        return float(loss) / distributed.tensor_parallel_size(), float(grad_norm)

    def _forward(self, iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        tokens = next(iterator)
        return model(tokens[:, :-1], torch.arange(LENGTH)[None], None), partial(self._loss, tokens[:, 1:])

    def _loss(
        self, labels: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        module = self.loaded.module
        logits, _ = module.output_layer(hidden, weight=module.head_weight())
        ids = distributed.tensor_parallel_rank() * logits.shape[-1] + torch.arange(logits.shape[-1])
        logits = logits.float().masked_fill(ids >= module.real_vocab_size, -1e9)
        loss = vocab_parallel_cross_entropy(logits, labels.T.contiguous()).sum()
        return loss, torch.tensor(labels.numel(), dtype=torch.int), {"loss": loss.detach()}

    def load(self, directory: Path, **options: Any) -> LoadedState:
        """Resume."""
        return load_checkpoint(
            directory, module=[self.module], optimizer=self.optimizer, scheduler=self.scheduler, **options
        )

    def save(self, directory: Path, iteration: int, **options: Any) -> Path:
        """Checkpoint everything."""
        return save_checkpoint(
            directory,
            iteration=iteration,
            module=[self.module],
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            **options,
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """This rank's parameters."""
        return {name: value.detach().clone() for name, value in self.loaded.module.named_parameters()}


def draws() -> list[float]:
    """One number of each generator."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        tracked = torch.rand(()).item()
    return [random.random(), float(numpy.random.rand()), torch.rand(()).item(), tracked]


def train_and_save(source: Path, directory: Path, kind: Kind) -> dict[str, Any]:
    """Two steps, checkpoint, two more steps."""
    run = Run(source, kind)
    run.steps(0, 2)
    draws()
    run.save(directory, 2, extra_state={"consumed_samples": 4}, hf_source=source)
    return _go_on(run)


def resume(source: Path, directory: Path, kind: Kind) -> dict[str, Any]:
    """A new process' objects, the checkpoint, two steps."""
    run = Run(source, kind)
    state = run.load(directory)
    assert (state.iteration, state.extra_state) == (2, {"consumed_samples": 4})
    return {"restored": state.random_state_restored, **_go_on(run)}


def _go_on(run: Run) -> dict[str, Any]:
    numbers = draws()
    reports = run.steps(2, 2)
    return {"draws": numbers, "reports": reports, "weights": run.weights()}
