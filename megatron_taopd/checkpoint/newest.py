"""The newest whole checkpoint of a directory: a damaged one is named, and the one before it taken."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_taopd.checkpoint import layout, publishing
from megatron_taopd.checkpoint.collective import on_rank_zero
from megatron_taopd.checkpoint.loading import LoadedState, load_checkpoint
from megatron_taopd.errors import CheckpointError, DamagedCheckpointError

logger = logging.getLogger(__name__)


def load_newest_checkpoint(
    directory: str | Path,
    *,
    module: torch.nn.Module | Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    is_own: bool,
) -> LoadedState | None:
    """Load the newest checkpoint that is whole, up to the one that the tracker file names. Collective.

    Args:
        is_own: the run saves there too: an empty directory is a new run, and damaged checkpoints are renamed once an
            earlier one is loaded.

    Returns:
        None where ``is_own`` and nothing is there yet.

    Raises:
        CheckpointError: no checkpoint, none that is whole, or one of another model or optimizer.
    """
    directory = Path(directory)
    candidates = on_rank_zero(lambda: _candidates(directory, is_own))
    if not candidates:
        return None
    damaged: list[tuple[Path, str]] = []
    for path in candidates:
        try:
            loaded = load_checkpoint(path, module=module, optimizer=optimizer, scheduler=scheduler)
        except DamagedCheckpointError as error:
            damaged.append((path, str(error)))
            if dist.get_rank() == 0:
                logger.error("%s", error)
            continue
        if damaged:
            on_rank_zero(partial(_tell_and_set_aside, damaged, loaded, is_own))
        return loaded
    raise CheckpointError(
        f"no checkpoint of {directory} is whole: {'; '.join(message for _, message in damaged)}. Restore one, or name "
        "another --load and --save to start anew"
    )


def _candidates(directory: Path, is_own: bool) -> list[Path]:
    """Newest first; empty where a new run may start."""
    if not directory.is_dir() and is_own:
        return []
    if not directory.is_dir() or layout.is_one_checkpoint(directory):
        return [layout.find_iteration(directory)[0]]
    if is_own:
        publishing.tidy(directory)
    numbers = layout.iterations(directory)
    try:
        latest = layout.read_latest_iteration(directory)
    except CheckpointError as error:
        if not numbers:
            raise
        logger.error("%s; taking the newest", error)
        latest = numbers[0]
    if latest is None and not numbers and is_own:
        return []
    if latest is None and numbers:
        latest = numbers[0]
        logger.error("%s has no %s; taking the newest checkpoint, iteration %d", directory, layout.TRACKER, latest)
    usable = [number for number in numbers if latest is not None and number <= latest]
    if not usable:  # a release, or nothing
        return [layout.find_iteration(directory)[0]]
    if usable[0] != latest:
        logger.error("%s names iteration %s, which is not there; taking %d", layout.TRACKER, latest, usable[0])
    return [directory / layout.iteration_name(number) for number in usable]


def _tell_and_set_aside(damaged: Sequence[tuple[Path, str]], loaded: LoadedState, is_own: bool) -> None:
    names = ", ".join(path.name for path, _ in damaged)
    logger.error(
        "going on from iteration %d instead of %s; the steps in between are made again", loaded.iteration, names
    )
    if not is_own:
        return
    for path, _ in damaged:
        try:
            publishing.set_damaged_aside(path, loaded.iteration)
        except OSError as error:
            logger.warning("cannot rename the damaged checkpoint %s: %s", path, error)
