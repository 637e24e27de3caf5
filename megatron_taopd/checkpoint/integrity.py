"""Is a checkpoint whole, and does it hold what is asked of it? Checked before megatron-core reads a byte.

megatron-core reads ``common.pt`` with ``torch.load(weights_only=True)`` and tensors as plain storages, but
the index ``.metadata`` with an unrestricted unpickler. Reading that file first with the few types that belong
there turns a torn or foreign file into a clear error and keeps code in it from running. Sharded objects
(extra states of Transformer Engine, the only ones we keep) are unpickled by torch without restriction: load
checkpoints with such objects from sources you trust.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_taopd.errors import DamagedCheckpointError

_TRUSTED_CLASSES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
_TRUSTED_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("builtins", "set"),
    ("builtins", "slice"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
}


class _IndexUnpickler(pickle.Unpickler):
    """Knows the types of a torch_dist index and no others."""

    def find_class(self, module: str, name: str) -> Any:
        value = super().find_class(module, name) if self._may_import(module, name) else None
        if (module, name) in _TRUSTED_NAMES or isinstance(value, torch.dtype):
            return value
        if isinstance(value, type) and module.startswith(_TRUSTED_CLASSES):
            return value
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint index")

    @staticmethod
    def _may_import(module: str, name: str) -> bool:
        return (module, name) in _TRUSTED_NAMES or module == "torch" or module.startswith(_TRUSTED_CLASSES)


def read_index(path: Path) -> Any:
    """The torch ``Metadata`` of a checkpoint.

    Raises:
        DamagedCheckpointError: a file is missing, shorter than the index says, or not what it should be.
    """
    for name in ("metadata.json", ".metadata"):
        if not (path / name).is_file():
            raise DamagedCheckpointError(f"checkpoint {path} is incomplete: no {name}; use an earlier iteration")
    try:
        with open(path / ".metadata", "rb") as stream:
            index = _IndexUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError) as error:
        raise DamagedCheckpointError(f"checkpoint {path} cannot be used: .metadata: {error}") from error
    # Newer releases of megatron-core keep the common state in the shards, under this key.
    in_shards = any(key.startswith("common_state") for key in index.state_dict_metadata)
    if not in_shards and not (path / "common.pt").is_file():
        raise DamagedCheckpointError(f"checkpoint {path} is incomplete: no common.pt; use an earlier iteration")
    needed: dict[str, int] = {}
    for info in index.storage_data.values():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
    for name, size in sorted(needed.items()):
        file = path / name
        if not file.is_file():
            raise DamagedCheckpointError(f"checkpoint {path} is incomplete: no {name}; use an earlier iteration")
        if file.stat().st_size < size:
            raise DamagedCheckpointError(
                f"checkpoint {path} is torn: {name} has {file.stat().st_size} bytes of {size}; use an earlier iteration"
            )
    return index


def stored_shapes(index: Any) -> dict[str, tuple[int, ...]]:
    """Global shape of each stored tensor."""
    return {
        name: tuple(entry.size) for name, entry in index.state_dict_metadata.items() if hasattr(entry, "properties")
    }


def mismatch(path: Path, sharded_state: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> str | None:
    """What keeps this state from being read, as one message; None if all is there.

    Word embeddings and output layer may differ in their padding; the real vocabulary is compared elsewhere.
    """
    problems = []
    for tensor in _tensors(sharded_state):
        wanted, stored = tuple(tensor.global_shape), shapes.get(tensor.key)
        if stored is None:
            problems.append(f"{tensor.key} is missing")
        elif tensor.allow_shape_mismatch and stored[1:] == wanted[1:]:
            continue
        elif stored != wanted:
            problems.append(f"{tensor.key} has shape {stored} in the checkpoint and {wanted} in this run")
    if not problems:
        return None
    problems = list(dict.fromkeys(problems))
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return f"checkpoint {path} is not of this model: {'; '.join(problems[:3])}{more}"


def _tensors(sharded_state: Any) -> Iterator[ShardedTensor]:
    for value in nested_values(sharded_state):
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, ShardedTensorFactory):
            built = value.build()
            yield from _tensors(built if isinstance(built, (dict, list)) else [built])
