"""Reading a checkpoint at any tensor-, pipeline- and data-parallel size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from megatron_taopd.checkpoint import checksums, integrity, model_state, optimizer_state
from megatron_taopd.checkpoint.collective import on_rank_zero
from megatron_taopd.checkpoint.layout import find_iteration
from megatron_taopd.checkpoint.random_state import restore_random_state
from megatron_taopd.errors import CheckpointError, DamagedCheckpointError
from megatron_taopd.platform.together import raise_together


@dataclass(frozen=True, kw_only=True)
class LoadedState:
    """What a checkpoint told beside the state it put into the objects."""

    path: Path
    iteration: int
    """Training steps done."""
    extra_state: dict[str, Any]
    """As given to ``save_checkpoint``."""
    random_state_restored: bool = False
    """False if the checkpoint was written on another layout; the generators are then as they were."""


def load_checkpoint(
    directory: str | Path,
    *,
    module: torch.nn.Module | Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    iteration: int | None = None,
) -> LoadedState:
    """Put weights, optimizer state, schedule and random states back. Collective.

    On the layout it was written on, training goes on to the bit; any other layout gets the same weights and
    optimizer state, with random states as they are. Learning rate, weight decay and the like stay those of
    this run; the schedule is only told how far it is.

    Args:
        iteration: None takes the newest.

    Raises:
        CheckpointError: missing, torn, or of another model or optimizer; raised on every rank.
    """
    return _load(directory, module=module, optimizer=optimizer, scheduler=scheduler, iteration=iteration)


def load_model_weights(
    directory: str | Path,
    module: torch.nn.Module | Sequence[torch.nn.Module],
    *,
    iteration: int | None = None,
) -> int:
    """Put the weights alone into a model, in its own dtype; returns the iteration. Collective.

    Raises:
        CheckpointError: missing, torn, or of another model; raised on every rank.
    """
    return _load(directory, module=module, iteration=iteration, weights_only=True).iteration


def load_head_weight(directory: str | Path, weight_VH: torch.Tensor | None, *, tied: bool, vocab_size: int) -> None:
    """Fill this rank's rows of the LM head alone, cut by the layout in force. Collective.

    Args:
        weight_VH: [padded vocabulary / TP, H]; its padding may differ from the checkpoint's. None off the last stage.
        tied: the embedding is the head.
        vocab_size: of the model, without padding.

    Raises:
        CheckpointError: missing, torn, or of another model; raised on every rank.
    """
    path, _ = _find_together(directory, None)
    on_rank_zero(lambda: integrity.stored_shapes(integrity.read_index(path)))
    shapes = integrity.stored_shapes(integrity.read_index(path))
    about = dist_checkpointing.load_common_state_dict(str(path)).get("taopd", {})
    _check_vocab_size(path, about, vocab_size)
    state: dict[str, Any] = {}
    if weight_VH is not None:
        state["head"] = make_tp_sharded_tensor_for_checkpoint(
            weight_VH, "embedding.word_embeddings.weight" if tied else "output_layer.weight", allow_shape_mismatch=True
        )
    raise_together(integrity.mismatch(path, state, shapes), CheckpointError)
    loaded = _read(state, path)
    if weight_VH is not None and loaded["head"] is not weight_VH:
        weight_VH.copy_(loaded["head"])


def _read(state: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(path))
    except (CheckpointException, CheckpointingException) as error:
        raise DamagedCheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def _load(
    directory: str | Path,
    *,
    module: torch.nn.Module | Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    iteration: int | None = None,
    weights_only: bool = False,
) -> LoadedState:
    path, iteration = _find_together(directory, iteration)
    sums = _check_bytes(path)
    index = integrity.read_index(path)
    chunks = model_state.unwrap(module)
    common = dist_checkpointing.load_common_state_dict(str(path))
    about = common.get("taopd", {})
    if about.get("has_checksums") and not sums:
        raise DamagedCheckpointError(f"checkpoint {path} is incomplete: no {checksums.SUMS}; use an earlier iteration")
    _check_same_kind(path, about, chunks, optimizer)

    state: dict[str, Any] = model_state.sharded_state(chunks, set(index.state_dict_metadata))
    shapes = integrity.stored_shapes(index)
    raise_together(integrity.mismatch(path, state, shapes), CheckpointError)
    if optimizer is not None:
        state["optimizer"] = optimizer_state.sharded_state(optimizer, state, is_loading=True)
        raise_together(integrity.mismatch(path, state["optimizer"], shapes), CheckpointError)
    loaded = _read(state, path)
    model_state.load_weights(chunks, loaded)
    if optimizer is not None:
        optimizer_state.load_state(optimizer, loaded["optimizer"])
    if scheduler is not None:
        if "opt_param_scheduler" not in loaded:
            raise CheckpointError(f"checkpoint {path} has no schedule (opt_param_scheduler)")
        scheduler.load_state_dict(loaded["opt_param_scheduler"])
    restored = not weights_only and restore_random_state(path, about.get("layout"))
    dist.barrier()
    return LoadedState(
        path=path, iteration=iteration, extra_state=about.get("extra_state", {}), random_state_restored=restored
    )


def _find_together(directory: str | Path, iteration: int | None) -> tuple[Path, int]:
    """Every rank looks at the same checkpoint, that of rank 0."""
    return on_rank_zero(lambda: find_iteration(directory, iteration))


def _check_bytes(path: Path) -> dict[str, str]:
    """Is all there, and as it was written? Each rank reads its share of the files."""
    sums = on_rank_zero(lambda: _sums_of_whole(path))
    damage = checksums.find_damage(path, sums, share=dist.get_rank(), shares=dist.get_world_size())
    message = None if damage is None else f"checkpoint {path} is damaged: {damage}; use an earlier iteration"
    raise_together(message, DamagedCheckpointError)
    return sums


def _sums_of_whole(path: Path) -> dict[str, str]:
    sums = checksums.read_sums(path)
    integrity.read_index(path)  # says so if a file is missing or short
    return sums


def _check_same_kind(
    path: Path,
    about: dict[str, Any],
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
) -> None:
    _check_vocab_size(path, about, model_state.real_vocab_size(chunks))
    if optimizer is None:
        return
    own, stored = optimizer_state.describe(optimizer), about.get("optimizer")
    if stored is None:
        raise CheckpointError(f"checkpoint {path} has weights alone, no optimizer state to resume from")
    if own != stored:
        raise CheckpointError(
            f"checkpoint {path} holds the state of {stored} and this run uses {own}; resume with the same "
            "--optimizer, --bf16 and --use-distributed-optimizer"
        )


def _check_vocab_size(path: Path, about: dict[str, Any], own: int | None) -> None:
    stored = about.get("real_vocab_size")
    if own is not None and stored is not None and own != stored:
        raise CheckpointError(
            f"checkpoint {path} is not of this model: its vocabulary has {stored} tokens and this run's {own}"
        )
