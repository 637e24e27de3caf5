"""Directories that a run writes to, tried before it works."""

from __future__ import annotations

from pathlib import Path

from megatron_taopd.checkpoint.publishing import why_not_writable
from megatron_taopd.config import TrainConfig
from megatron_taopd.errors import ConfigError
from megatron_taopd.platform import distributed
from megatron_taopd.platform.together import raise_together


def check_writable(config: TrainConfig) -> None:
    """Write a small file where the run will write. Collective.

    Raises:
        ConfigError: that fails; every rank raises it.
    """
    places = {"--save": config.checkpoint.save}
    if distributed.rank() == 0:  # alone it writes the others
        places |= {
            "--log-dir": config.logging.log_dir,
            "--tensorboard-dir": config.logging.tensorboard_dir,
            "--rollout-weights-dir": config.rollout_server.rollout_weights_dir,
        }
    problem = None
    for flag, place in places.items():
        why_not = None if place is None else why_not_writable(Path(place))
        if why_not is not None:
            problem = f"{flag} {place} cannot be written (rank {distributed.rank()}): {why_not}; name another directory"
    raise_together(problem, ConfigError)
