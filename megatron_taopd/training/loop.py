"""The loop: rollout, score, select, train, step. Everything periodic is a hook."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_taopd.config import TrainConfig
from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.data.records import Rollout
from megatron_taopd.errors import NonFiniteError, RolloutError
from megatron_taopd.platform import distributed, progress
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.run_config import BatchConfig
from megatron_taopd.training.batching import replica_micro_batches
from megatron_taopd.training.forward import run_schedule
from megatron_taopd.training.hooks.base import Hook
from megatron_taopd.training.metrics import step_metrics
from megatron_taopd.training.monitor import Monitor
from megatron_taopd.training.non_finite import FiniteCheck, write_down
from megatron_taopd.training.pair import ModelPair
from megatron_taopd.training.phases import open_scope
from megatron_taopd.training.scopes import Outcome, SelectionScope
from megatron_taopd.training.sources import ResponseSource
from megatron_taopd.training.step import DistillationForwardStep
from megatron_taopd.training.stopping import Stopping

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where the run is; saved with every checkpoint."""

    iteration: int = 0
    consumed_samples: int = 0
    selection: dict[str, Any] = field(default_factory=dict)
    """What the selection knows of earlier steps, as it was when the run started or resumed."""
    skipped_non_finite: int = 0
    """Steps left out because a loss or gradient was not finite."""


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
                check_for_nan_in_grad=False,  # non_finite.py does, on all ranks together
                fp8_param_gather=pair.student.config.fp8_param,
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
        stopping: Stopping | None = None,
    ) -> None:
        self.config = config
        self.pair = pair
        self.student = student
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.source = source
        self.hooks = list(hooks)
        self.silenced: list[Hook] = []
        self.state = state or TrainState()
        self.stopping = stopping or Stopping(config.checkpoint)
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
        self.scope = self._open_scope(self.state.selection)
        self.finite = FiniteCheck(student)
        self.monitor = Monitor(config, pair)
        self.last_step: tuple[list[Rollout], Outcome] | None = None
        model_config = pair.student.config
        model_config.finalize_model_grads_func = self.finite.finalize_grads
        model_config.grad_scale_func = optimizer.scale_loss

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.state.iteration >= self.config.batch.train_iters

    def fit(self) -> bool:
        """Train up to ``--train-iters``; hooks see every step.

        Returns:
            False where the run was asked to stop earlier.

        Raises:
            NonFiniteError: a step cannot be made; hooks have seen the run stop ahead of it.
            RolloutError: a server does not answer prompts, or does not load weights; the same.
        """
        for hook in self.hooks:
            hook.on_start(self)
        first = self.state.iteration
        while not self.finished:
            progress.enter("between steps")
            reason = self.stopping.reason(self.state.iteration, steps_made=self.state.iteration - first)
            if reason is not None:
                logger.info("stopping after iteration %d of %d: %s", *self._place(), reason)
                self._stop()
                return False
            try:
                metrics = self.step()
                for hook in self.hooks:
                    self._call(hook, hook.on_step, self, metrics)
            except (NonFiniteError, RolloutError):
                self._stop()
                raise
        for hook in self.hooks:
            self._call(hook, hook.on_end, self)
        return True

    def _stop(self) -> None:
        for hook in self.hooks:
            self._call(hook, hook.on_stop, self)

    def _call(self, hook: Hook, method: Callable[..., None], *args: Any) -> None:
        progress.enter(type(hook).__name__)
        try:
            method(*args)
        except OSError as error:
            if not hook.only_tells:
                raise
            if hook not in self.silenced:
                logger.warning("%s: %s; training goes on without what it tells", type(hook).__name__, error)
                self.silenced.append(hook)

    def _place(self) -> tuple[int, int]:
        return self.state.iteration, self.config.batch.train_iters

    def step(self) -> dict[str, float]:
        """One training step on fresh responses; the metrics are the same on every rank."""
        started = time.perf_counter()
        step_number = self.state.iteration
        progress.enter("rollout", step_number + 1)
        rollouts = self.source.responses(
            consumed_samples=self.state.consumed_samples,
            global_batch_size=self.config.batch.global_batch_size,
            step=step_number,
        )
        rolled_out = time.perf_counter()
        progress.enter("score")

        micro_batches = self.micro_batches(rollouts)
        for rollout in rollouts:
            rollout.hidden_TH = None  # the micro-batches have them now
        batches = self.scope.before(micro_batches, step=step_number)
        scored_at = time.perf_counter()
        progress.enter("train")

        for chunk in self.student:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = run_schedule(self.forward_step, self.student, batches, micro_batches[0], forward_only=False)
        progress.enter("update")
        is_finite = self.finite.passes(reports)
        selection_state = None if is_finite else copy.deepcopy(self.scope.state())
        updated, grad_norm, _ = self.optimizer.step() if is_finite else (False, math.nan, None)
        self.pair.student_has_changed()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if updated:
            self.scheduler.step(increment=self.config.batch.global_batch_size)
        outcome = self.scope.after(step=step_number)
        if selection_state is not None:
            self.scope = self._open_scope(selection_state)
            self._leave_out(rollouts, micro_batches, reports, outcome)
        self.last_step = rollouts, outcome
        trained = time.perf_counter()

        self.state.iteration += 1
        self.state.consumed_samples += self.config.batch.global_batch_size
        metrics = step_metrics(
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
        return metrics | self.source.figures()

    def _leave_out(
        self,
        rollouts: list[Rollout],
        micro_batches: list[MicroBatch],
        reports: list[dict[str, torch.Tensor]],
        outcome: Outcome,
    ) -> None:
        """Write a step that is not finite down, and count it.

        Raises:
            NonFiniteError: it is one too many.
        """
        first = distributed.data_parallel_rank() * self.local_batch_size
        findings = self.finite.findings(
            reports, outcome, micro_batches, lambda indices: [rollouts[index - first].id for index in indices]
        )
        iteration = self.state.iteration + 1
        root, written = self.config.logging.log_dir or self.config.checkpoint.save, "--log-dir would keep its batch"
        if root is not None:
            directory = Path(root) / "non_finite" / f"iter_{iteration:07d}"
            written = write_down(directory, iteration, findings=findings, outcome=outcome, rollouts=rollouts)
        message = f"iteration {iteration} is not finite: {' | '.join(map(str, findings[:4]))}; {written}"
        allowed = self.config.optimization.max_skipped_non_finite
        if self.state.skipped_non_finite >= allowed:
            raise NonFiniteError(
                f"{message}. The optimizer has not stepped. A lower --lr or a smaller --clip-grad may keep the weights "
                f"in bounds; --max-skipped-non-finite (now {allowed}) leaves such steps out"
            )
        self.state.skipped_non_finite += 1
        logger.warning("%s. Left out, %d of %d", message, self.state.skipped_non_finite, allowed)

    def _open_scope(self, saved: dict[str, Any]) -> SelectionScope:
        return open_scope(self.config, self.pair, self.student, temperature=self.temperature, saved=saved)

    def micro_batches(self, rollouts: list[Rollout]) -> list[MicroBatch]:
        """This rank's part of its replica's responses."""
        return replica_micro_batches(
            rollouts,
            self.config.parallel,
            self.config.packing,
            micro_batch_size=self.config.batch.micro_batch_size,
            sample_offset=distributed.data_parallel_rank() * self.local_batch_size,
            teacher_names=self.pair.teacher_names,
            alignment=self.config.precision.token_alignment,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values that a checkpoint keeps beside weights and optimizer."""
        return {
            "iteration": self.state.iteration,
            "consumed_samples": self.state.consumed_samples,
            "skipped_non_finite": self.state.skipped_non_finite,
            "selection": self.scope.state(),
            "data": self.source.fingerprint(),
        }
