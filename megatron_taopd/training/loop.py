"""The loop: rollout, score, select, train, step. Everything periodic is a hook."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_taopd.config import TrainConfig
from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.data.records import Rollout
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.run_config import BatchConfig
from megatron_taopd.training.batching import replica_micro_batches
from megatron_taopd.training.forward import run_schedule
from megatron_taopd.training.hooks.base import Hook
from megatron_taopd.training.metrics import step_metrics
from megatron_taopd.training.monitor import Monitor
from megatron_taopd.training.pair import ModelPair
from megatron_taopd.training.phases import open_scope
from megatron_taopd.training.scopes import Outcome, SelectionScope
from megatron_taopd.training.sources import ResponseSource
from megatron_taopd.training.step import DistillationForwardStep

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where the run is; saved with every checkpoint."""

    iteration: int = 0
    consumed_samples: int = 0
    selection: dict[str, Any] = field(default_factory=dict)
    """What the selection knows of earlier steps, as it was when the run started or resumed."""


def local_batch_size(global_batch_size: int, micro_batch_size: int, parallel: ParallelConfig) -> int:
    """Responses a step on this data-parallel rank.

    Raises:
        ConfigError: see :meth:`BatchConfig.per_replica`.
    """
    batch = BatchConfig(global_batch_size=global_batch_size, micro_batch_size=micro_batch_size)
    return batch.per_replica(parallel, distributed.data_parallel_size())


def wrap_student(pair: ModelPair, *, use_distributed_optimizer: bool, bf16: bool) -> list[DistributedDataParallel]:
    """Megatron's DDP around the student (each virtual stage): gradients accumulate in contiguous buffers."""
    return [
        DistributedDataParallel(
            config=pair.student.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=bf16,
                use_distributed_optimizer=use_distributed_optimizer,
                check_for_nan_in_grad=True,
            ),
            module=module,
        )
        for module in pair.student.modules
    ]


class Trainer:
    """Runs training steps over one pair of models."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        pair: ModelPair,
        student: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        source: ResponseSource,
        hooks: Sequence[Hook] = (),
        state: TrainState | None = None,
    ) -> None:
        self.config = config
        self.pair = pair
        self.student = student
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.source = source
        self.hooks = list(hooks)
        self.state = state or TrainState()
        self.temperature = config.scoring.resolve_temperature(config.rollout.temperature)
        self.local_batch_size = local_batch_size(
            config.batch.global_batch_size, config.batch.micro_batch_size, config.parallel
        )
        self.forward_step = DistillationForwardStep(
            pair=pair,
            loss=config.loss,
            support_k=config.selection.support_k,
            temperature=self.temperature,
            logits_chunk_bytes=config.scoring.logits_chunk_bytes,
        )
        self.scope: SelectionScope = open_scope(
            config, pair, student, temperature=self.temperature, saved=self.state.selection
        )
        self.monitor = Monitor(config, pair)
        self.last_step: tuple[list[Rollout], Outcome] | None = None
        model_config = pair.student.config
        model_config.finalize_model_grads_func = finalize_model_grads
        model_config.grad_scale_func = optimizer.scale_loss

    def fit(self) -> None:
        """Train up to ``--train-iters``; hooks see every step."""
        for hook in self.hooks:
            hook.on_start(self)
        while self.state.iteration < self.config.batch.train_iters:
            metrics = self.step()
            for hook in self.hooks:
                hook.on_step(self, metrics)
        for hook in self.hooks:
            hook.on_end(self)

    def step(self) -> dict[str, float]:
        """One training step on fresh responses; the metrics are the same on every rank."""
        started = time.perf_counter()
        step_number = self.state.iteration
        rollouts = self.source.responses(
            consumed_samples=self.state.consumed_samples,
            global_batch_size=self.config.batch.global_batch_size,
            step=step_number,
        )
        rolled_out = time.perf_counter()

        micro_batches = self.micro_batches(rollouts)
        for rollout in rollouts:
            rollout.hidden_TH = None  # the micro-batches have them now
        batches = self.scope.before(micro_batches, step=step_number)
        scored_at = time.perf_counter()

        for chunk in self.student:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = run_schedule(self.forward_step, self.student, batches, micro_batches[0], forward_only=False)
        updated, grad_norm, _ = self.optimizer.step()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if updated:
            self.scheduler.step(increment=self.config.batch.global_batch_size)
        outcome = self.scope.after(step=step_number)
        self.last_step = rollouts, outcome
        trained = time.perf_counter()

        self.state.iteration += 1
        self.state.consumed_samples += self.config.batch.global_batch_size
        return step_metrics(
            iteration=self.state.iteration,
            rollouts=rollouts,
            teachers=self.pair.given_names,
            outcome=outcome,
            monitor=self.monitor,
            reports=reports,
            loss_normalization=self.config.loss.loss_normalization,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            skipped=not updated,
            times={
                "time_rollout": rolled_out - started,
                "time_score": scored_at - rolled_out,
                "time_train": trained - scored_at,
                "time_step": trained - started,
            },
        )

    def micro_batches(self, rollouts: list[Rollout]) -> list[MicroBatch]:
        """This rank's part of its replica's responses."""
        return replica_micro_batches(
            rollouts,
            self.config.parallel,
            self.config.packing,
            micro_batch_size=self.config.batch.micro_batch_size,
            sample_offset=distributed.data_parallel_rank() * self.local_batch_size,
            teacher_names=self.pair.teacher_names,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values that a checkpoint keeps beside weights and optimizer."""
        counts = {"iteration": self.state.iteration, "consumed_samples": self.state.consumed_samples}
        return {**counts, "selection": self.scope.state()}
