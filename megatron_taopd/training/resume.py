"""Resuming a run from its newest checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_taopd.checkpoint import load_checkpoint, read_latest_iteration
from megatron_taopd.training.loop import TrainState

logger = logging.getLogger(__name__)


def resume(
    directory: str,
    *,
    student: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    may_be_empty: bool,
) -> TrainState:
    """Load weights, optimizer, schedule, random states and counts.

    Args:
        may_be_empty: a directory without a checkpoint starts a new run (a job whose load path is its save path).

    Raises:
        CheckpointError: there is no usable checkpoint.
    """
    if may_be_empty and read_latest_iteration(Path(directory)) is None:
        logger.info("no checkpoint in %s yet: starting a new run", directory)
        return TrainState()
    loaded = load_checkpoint(directory, module=student, optimizer=optimizer, scheduler=scheduler)
    logger.info("resumed from iteration %d of %s", loaded.iteration, directory)
    return TrainState(
        iteration=loaded.extra_state["iteration"],
        consumed_samples=loaded.extra_state["consumed_samples"],
        selection=loaded.extra_state["selection"],
    )
