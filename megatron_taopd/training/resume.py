"""Resuming a run from its newest whole checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_taopd.checkpoint import load_newest_checkpoint, read_saved_config
from megatron_taopd.training.loop import TrainState
from megatron_taopd.training.sources import ResponseSource

logger = logging.getLogger(__name__)

CHANGES_NOTHING = (
    "async_save",
    "distributed_timeout_minutes",
    "exit_duration_in_mins",
    "exit_interval",
    "export_hf",
    "keep_last_checkpoints",
    "load",
    "log_dir",
    "log_interval",
    "rollout_api_key_env",
    "rollout_max_in_flight",
    "rollout_retries",
    "rollout_timeout",
    "rollout_url",
    "rollout_weights_dir",
    "save",
    "save_interval",
    "tensorboard_dir",
    "train_iters",
)
"""Flags that no number of the steps to come depends on (--train-iters through the schedule, which is told apart)."""


def resume(
    directory: str,
    *,
    student: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    source: ResponseSource,
    resolved_config: dict[str, Any],
    is_own: bool,
) -> TrainState:
    """Load weights, optimizer, schedule, random states and counts; say what differs from the run that saved them.

    Args:
        source: where the responses come from; the position counts in its data.
        resolved_config: of this run.
        is_own: a directory without a checkpoint starts a new run (a job whose load path is its save path).

    Raises:
        CheckpointError: there is no usable checkpoint.
    """
    loaded = load_newest_checkpoint(directory, module=student, optimizer=optimizer, scheduler=scheduler, is_own=is_own)
    if loaded is None:
        logger.info("no checkpoint in %s yet: starting a new run", directory)
        return TrainState()
    logger.info("resumed from iteration %d of %s", loaded.iteration, directory)
    _tell_changed_flags(loaded.path, resolved_config)
    saved = loaded.extra_state
    if saved["data"] != source.fingerprint():
        logger.warning(
            "the data is not that of the checkpoint (%s, now %s): what follows sample %d is not what the saved run "
            "would have read",
            saved["data"],
            source.fingerprint(),
            saved["consumed_samples"],
        )
    return TrainState(
        iteration=saved["iteration"],
        consumed_samples=saved["consumed_samples"],
        skipped_non_finite=saved["skipped_non_finite"],
        selection=saved["selection"],
    )


def _tell_changed_flags(checkpoint: Path, now: dict[str, Any]) -> None:
    before = read_saved_config(checkpoint)
    if before is None:
        return
    changed = changed_flags(before, now)
    if changed:
        logger.info("flags that differ from those of the checkpoint: %s", ", ".join(changed))


def changed_flags(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What numbers of the steps to come depend on and differs, as ``name before -> now``."""
    now = json.loads(json.dumps(now, default=str))  # as the checkpoint's went through JSON
    names = [name for name in now if name in before and name not in CHANGES_NOTHING]
    return [f"{name} {before[name]} -> {now[name]}" for name in names if before[name] != now[name]]
