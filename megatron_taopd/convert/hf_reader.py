"""Safetensors files of an HF directory, read slice by slice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_taopd.convert.safetensors_files import DTYPES, StoredTensor, read_header
from megatron_taopd.errors import ModelError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# Not weights: older Llama files keep the rotary frequencies, which follow from the configuration.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"


class HFReader:
    """Finds tensors by name over one safetensors file or an index of several, and reads headers as needed.

    Raises:
        ModelError: no safetensors in the directory, or an index that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._headers: dict[str, dict[str, StoredTensor]] = {}
        if (path / _INDEX).is_file():
            self._files = self._read_index()
        elif (path / _SINGLE).is_file():
            self._files = dict.fromkeys(self._header(_SINGLE), _SINGLE)
        else:
            others = sorted(file.name for file in path.glob("*.bin")) + sorted(
                file.name for file in path.glob("*.gguf")
            )
            found = f" (found {', '.join(others[:3])}; convert to safetensors first)" if others else ""
            raise ModelError(f"{path} has neither {_SINGLE} nor {_INDEX}{found}")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, by the index."""
        return self.path / self._files[name]

    def slice(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """A handle on a tensor, from which slices are read.

        Args:
            name: HF tensor name.
            shape: what config.json implies.

        Raises:
            ModelError: the tensor or its file is missing, or it has another shape or an integer type.
        """
        if name not in self._files:
            raise ModelError(f"{self.path} has no tensor {name!r}: its weights are incomplete")
        stored = self._header(self._files[name]).get(name)
        if stored is None:
            raise ModelError(f"{self.file_of(name)} should hold {name!r} by the index but does not")
        if stored.shape != shape:
            raise ModelError(
                f"{stored.file}: {name!r} has shape {list(stored.shape)}, but config.json implies {list(shape)}"
            )
        if stored.type_name not in DTYPES:
            raise ModelError(
                f"{stored.file}: {name!r} is stored as {stored.type_name}; supported: {', '.join(sorted(DTYPES))}"
            )
        return stored

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A whole tensor."""
        return self.slice(name, shape)[:]

    def refuse_others(self, known: set[str], *, tied: bool) -> None:
        """Refuse tensors for which Megatron's model has no place. All headers are read.

        Args:
            known: names of the tensors that will be used.
            tied: the embedding is the head as well; a copy of it in the files is passed over if it is one.

        Raises:
            ModelError: names a tensor and its file.
        """
        for name in sorted(self._files.keys() - known):
            if name.endswith(_IGNORED_SUFFIX) or (tied and name == "lm_head.weight" and self._is_embedding(name)):
                continue
            why = ""
            if tied and name == "lm_head.weight":
                why = ": tie_word_embeddings says that the embedding is the head, but the head here is another"
            raise ModelError(f"{self.file_of(name)}: no place for tensor {name!r} in this architecture{why}")
        for file in sorted(set(self._files.values())):
            for name in sorted(self._header(file).keys() - self._files.keys()):
                raise ModelError(f"{self.path / file} holds {name!r}, which {_INDEX} does not know")

    def _is_embedding(self, name: str) -> bool:
        head = self._header(self._files[name])[name]
        embedding = self.slice("model.embed_tokens.weight", head.shape)
        return all(
            torch.equal(head[row : row + 4096], embedding[row : row + 4096]) for row in range(0, head.shape[0], 4096)
        )

    def identity(self) -> dict[str, Any]:
        """Names, sizes and times of the files: what tells whether they were changed."""
        files = {}
        for name in sorted(set(self._files.values())):
            status = (self.path / name).stat()
            files[name] = [status.st_size, status.st_mtime_ns]
        return {"path": str(self.path.absolute()), "files": files}

    def _read_index(self) -> dict[str, str]:
        file = self.path / _INDEX
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"cannot read {file}: {error!r}") from error

    def _header(self, name: str) -> dict[str, StoredTensor]:
        if name not in self._headers:
            file = self.path / name
            if not file.is_file():
                raise ModelError(f"{file} is missing: the model was not downloaded completely")
            self._headers[name] = read_header(file)
        return self._headers[name]
