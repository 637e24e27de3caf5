"""Random states of one rank: Python, NumPy, torch, CUDA and Megatron's tracker, as plain values."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_taopd.checkpoint.layout import RANDOM_STATES
from megatron_taopd.checkpoint.writing import write_saved

logger = logging.getLogger(__name__)


def current_layout() -> dict[str, int]:
    """Sizes that decide which rank draws what."""
    return {
        "world_size": dist.get_world_size(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
    }


def save_random_state(path: Path) -> None:
    """Write this rank's states below the checkpoint ``path``."""
    numpy_state: Any = numpy.random.get_state()
    name, keys, position, has_gauss, cached_gaussian = numpy_state
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(numpy.asarray(keys, dtype="int64")), position, has_gauss, cached_gaussian),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": dict(get_cuda_rng_tracker().get_states()),
    }
    write_saved(states, path / random_state_name())


def restore_random_state(path: Path, saved_layout: dict[str, int] | None) -> bool:
    """Set this rank's states, if the checkpoint was written on the same layout; says whether it did."""
    file = path / random_state_name()
    if saved_layout != current_layout() or not file.is_file():
        logger.info(
            "checkpoint %s was written on another layout (%s): random states start from the seed",
            path,
            saved_layout,
        )
        return False
    states = torch.load(file, map_location="cpu", weights_only=True)
    random.setstate(states["python"])
    name, keys, position, has_gauss, cached_gaussian = states["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached_gaussian))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    return True


def random_state_name() -> str:
    """Where this rank's states are, relative to the checkpoint."""
    return f"{RANDOM_STATES}/rank_{dist.get_rank():05d}.pt"
