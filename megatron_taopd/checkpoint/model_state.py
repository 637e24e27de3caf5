"""The sharded state of the model chunks of this rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.transformer.module import MegatronModule

from megatron_taopd.checkpoint.optimizer_state import METADATA


def unwrap(module: torch.nn.Module | Sequence[torch.nn.Module]) -> list[MegatronModule]:
    """The models inside DDP and precision wrappers, one a pipeline chunk."""
    chunks: list[MegatronModule] = []
    chunk: Any
    for chunk in [module] if isinstance(module, torch.nn.Module) else module:
        while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):
            chunk = inner
        chunks.append(chunk)
    return chunks


def chunk_names(chunks: Sequence[MegatronModule]) -> list[str]:
    """Megatron's keys: ``model``, or ``model0``, ``model1``, … with several chunks a rank."""
    return ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]


def sharded_state(chunks: Sequence[torch.nn.Module], stored_objects: set[str] | None = None) -> dict[str, Any]:
    """Chunk name -> megatron-core's sharded description of its weights.

    Args:
        stored_objects: keys in the checkpoint when loading. Extra states (of Transformer Engine) are left out
            when they hold nothing, or when the checkpoint has none.
    """
    state = {}
    model: Any
    for name, model in zip(chunk_names(chunks), chunks, strict=True):
        entries = model.sharded_state_dict(metadata=dict(METADATA))
        state[name] = {key: entry for key, entry in entries.items() if _kept(entry, stored_objects)}
    return state


def _kept(entry: Any, stored_objects: set[str] | None) -> bool:
    if not isinstance(entry, ShardedObject):
        return True
    if stored_objects is not None:
        return entry.unique_key in stored_objects
    return entry.data is not None


def load_weights(chunks: Sequence[MegatronModule], state: dict[str, Any]) -> None:
    """Put loaded weights into the models.

    Raises:
        RuntimeError: a parameter of the model was not described by its ``sharded_state_dict``.
    """
    for name, chunk in zip(chunk_names(chunks), chunks, strict=True):
        missing, unexpected = chunk.load_state_dict(state[name], strict=False)
        missing = [key for key in missing if "_extra_state" not in key]
        if missing or unexpected:
            raise RuntimeError(f"weights not loaded: {missing}; not known to the model: {unexpected}")


def real_vocab_size(chunks: Sequence[MegatronModule]) -> int | None:
    """Vocabulary without padding, where the model knows it."""
    return getattr(chunks[0], "real_vocab_size", None)
