"""``taopd train``."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_taopd.cli import parse
from megatron_taopd.commands.common import announce, ranks
from megatron_taopd.config import TrainConfig
from megatron_taopd.exit_status import FINISHED, RUN_AGAIN

if TYPE_CHECKING:
    from megatron_taopd.training.hooks.base import Hook
    from megatron_taopd.training.loop import Trainer
    from megatron_taopd.training.stopping import Stopping

logger = logging.getLogger(__name__)


def train(words: Sequence[str]) -> int:
    """Distil a teacher into a student on the student's own responses; returns the exit status."""
    config: TrainConfig = parse(TrainConfig, words, name="train")
    with ranks(config.parallel, seed=config.seed):
        return FINISHED if run_training(config) else RUN_AGAIN


def run_training(config: TrainConfig, *, further_hooks: Sequence[Hook] = ()) -> bool:
    """Train as configured; process groups exist. Everything that can be refused is refused before any step.

    Args:
        further_hooks: called after those that the configuration asks for.

    Returns:
        False where the run stopped early, as asked, and goes on from its checkpoint.
    """
    import torch

    from megatron_taopd.training.stopping import Stopping
    from megatron_taopd.training.watchdog import Watchdog

    # Ranks end with their torchrun; a process that a shell started outlives it, as with nohup.
    parent = os.getppid() if torch.distributed.is_torchelastic_launched() else None
    with Stopping(config.checkpoint) as stopping:
        trainer = prepare_training(config, further_hooks=further_hooks, stopping=stopping)
        with Watchdog(60 * config.parallel.distributed_timeout_minutes, parent=parent):
            return trainer.fit()


def prepare_training(config: TrainConfig, *, further_hooks: Sequence[Hook], stopping: Stopping) -> Trainer:
    """Models, data, optimizer and hooks; resumed where a checkpoint is to be loaded."""
    from megatron_taopd.ops.triton_statistics import check_statistics_kernel
    from megatron_taopd.platform import device
    from megatron_taopd.training.directories import check_writable
    from megatron_taopd.training.hooks.checkpoint import CheckpointHook, ExportHook
    from megatron_taopd.training.hooks.console import ConsoleHook
    from megatron_taopd.training.hooks.kept_tokens import KeptTokensHook
    from megatron_taopd.training.hooks.metrics_file import MetricsFileHook
    from megatron_taopd.training.hooks.rollout_server import RolloutServerHook
    from megatron_taopd.training.hooks.tensorboard import TensorBoardHook
    from megatron_taopd.training.loop import Trainer, TrainState, local_batch_size, wrap_student
    from megatron_taopd.training.optimizer import build_optimizer, build_scheduler
    from megatron_taopd.training.pair import load_pair
    from megatron_taopd.training.resume import resume
    from megatron_taopd.training.scoring import check_score_head
    from megatron_taopd.training.sources import open_source

    batch, logging_config, checkpoint = config.batch, config.logging, config.checkpoint
    check_statistics_kernel(config.scoring.statistics_kernel, k=config.selection.support_k, device_type=device().type)
    check_score_head(config.score_head)
    check_writable(config)
    resolved = announce(config, "taopd train", save_to=logging_config.log_dir)
    local_batch_size(batch.global_batch_size, batch.micro_batch_size, config.parallel)
    pair = load_pair(
        config.models,
        config.parallel,
        config.precision,
        train_student=True,
        recompute=config.recompute,
        offload_teacher=config.scoring.offload_teacher,
        teacher_parallel=config.teacher_parallel,
        teacher_fp8=config.teacher_fp8,
    )
    source = open_source(config, pair)
    student = wrap_student(
        pair,
        use_distributed_optimizer=config.optimization.use_distributed_optimizer,
        bf16=config.precision.bf16,
    )
    optimizer = build_optimizer(config.optimization, student, bf16=config.precision.bf16)
    scheduler = build_scheduler(
        config.optimization,
        optimizer,
        train_iters=batch.train_iters,
        global_batch_size=batch.global_batch_size,
    )
    state = TrainState()
    if checkpoint.load is not None:
        state = resume(
            checkpoint.load,
            student=student,
            optimizer=optimizer,
            scheduler=scheduler,
            source=source,
            resolved_config=resolved,
            is_own=checkpoint.load == checkpoint.save,
        )
    hooks: list[Hook] = [ConsoleHook(logging_config.log_interval)]
    if logging_config.log_dir is not None:
        hooks.append(MetricsFileHook(logging_config.log_dir))
        hooks += KeptTokensHook.asked_for(config)
    if logging_config.tensorboard_dir is not None:
        hooks.append(TensorBoardHook(logging_config.tensorboard_dir))
    if checkpoint.save is not None:
        hooks.append(CheckpointHook(checkpoint, resolved))
    if checkpoint.export_hf is not None:
        hooks.append(ExportHook(checkpoint.export_hf))
    hooks += RolloutServerHook.asked_for(config, source)  # behind the checkpoint, because an update may fail
    return Trainer(
        config,
        pair=pair,
        student=student,
        optimizer=optimizer,
        scheduler=scheduler,
        source=source,
        hooks=[*hooks, *further_hooks],
        state=state,
        stopping=stopping,
    )
