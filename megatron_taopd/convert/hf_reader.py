"""Safetensors files of an HF directory, read slice by slice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_taopd.convert.mapping import Sliceable
from megatron_taopd.errors import ModelError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_READABLE = {"F64", "F32", "F16", "BF16"}


class HFReader:
    """Finds tensors by name over one safetensors file or an index of several, and opens files as needed.

    Raises:
        ModelError: no safetensors in the directory, or an index that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[str, Any] = {}
        if (path / _INDEX).is_file():
            self._files = self._read_index()
        elif (path / _SINGLE).is_file():
            self._files = dict.fromkeys(self._file(_SINGLE).keys(), _SINGLE)
        else:
            others = sorted(file.name for file in path.glob("*.bin")) + sorted(
                file.name for file in path.glob("*.gguf")
            )
            found = f" (found {', '.join(others[:3])}; convert to safetensors first)" if others else ""
            raise ModelError(f"{path} has neither {_SINGLE} nor {_INDEX}{found}")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def slice(self, name: str, shape: tuple[int, ...]) -> Sliceable:
        """A handle on a tensor, from which slices are read.

        Args:
            name: HF tensor name.
            shape: what config.json implies.

        Raises:
            ModelError: the tensor or its file is missing, or it has another shape or an integer type.
        """
        if name not in self._files:
            raise ModelError(f"{self.path} has no tensor {name!r}: its weights are incomplete")
        handle = self._file(self._files[name])
        try:
            part = handle.get_slice(name)
        except SafetensorError as error:
            raise ModelError(
                f"{self.path / self._files[name]} should hold {name!r} by the index but does not: {error}"
            ) from error
        if tuple(part.get_shape()) != shape:
            raise ModelError(
                f"{self.path}: {name!r} has shape {list(part.get_shape())}, but config.json implies {list(shape)}"
            )
        if part.get_dtype() not in _READABLE:
            raise ModelError(
                f"{self.path}: {name!r} is stored as {part.get_dtype()}; supported: {', '.join(sorted(_READABLE))}"
            )
        return part

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A whole tensor."""
        return self.slice(name, shape)[:]

    def _read_index(self) -> dict[str, str]:
        file = self.path / _INDEX
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"cannot read {file}: {error!r}") from error

    def _file(self, name: str) -> Any:
        if name not in self._open:
            file = self.path / name
            if not file.is_file():
                raise ModelError(f"{file} is missing: the model was not downloaded completely")
            try:
                self._open[name] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} cannot be read, it may be truncated: {error}") from error
        return self._open[name]
