"""Writes an HF directory: weight files, configuration, and the tokenizer files of another one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_taopd.errors import ModelError
from megatron_taopd.models.hf_config import HFModelConfig

# Files of the tokenizer and of generation, by how their names begin; the model card is another model's.
_COPIED = (
    "added_tokens",
    "additional_chat_templates",
    "chat_template",
    "generation_config",
    "LICENSE",
    "merges",
    "special_tokens",
    "spiece",
    "tokenizer",
    "vocab",
)


class HFWriter:
    """Collects tensors into weight files beside ``out_dir`` and puts the directory in place at the end."""

    def __init__(self, out_dir: Path, max_shard_bytes: int) -> None:
        self.out_dir = out_dir.absolute()
        self.max_shard_bytes = max_shard_bytes
        self._aside = self.out_dir.with_name(f".{self.out_dir.name}.{os.getpid()}.partial")
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0
        self._total_bytes = 0
        self._parts: list[list[str]] = []
        self._dtype = "float32"

    def begin(self) -> None:
        """Create the directory aside.

        Raises:
            ModelError: something that is no HF directory is in the way.
        """
        occupied = self.out_dir.exists() and (not self.out_dir.is_dir() or any(self.out_dir.iterdir()))
        if occupied and not (self.out_dir / "config.json").is_file():
            raise ModelError(f"{self.out_dir} exists and is not an HF model directory; it is left alone")
        self._aside.mkdir(parents=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; files are written as they fill up."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self.max_shard_bytes:
            self._flush()
        self._held[name] = tensor
        self._held_bytes += size
        self._dtype = str(tensor.dtype).removeprefix("torch.")

    def finish(self, hf: HFModelConfig, source_dir: Path) -> None:
        """Write the rest, add configuration and tokenizer, and rename the directory into place."""
        self._flush()
        self._name_parts()
        self._write_json("config.json", self._config(hf))
        for source in sorted(source_dir.iterdir()):
            if not source.name.startswith(_COPIED) or source.suffix == ".py":
                continue
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, self._aside / source.name)
        if self.out_dir.exists():
            old = self._aside.with_suffix(".old")
            self.out_dir.rename(old)
            self._aside.rename(self.out_dir)
            shutil.rmtree(old)
        else:
            self._aside.rename(self.out_dir)

    def _flush(self) -> None:
        self._parts.append(list(self._held))
        save_file(self._held, self._aside / f"part-{len(self._parts)}", metadata={"format": "pt"})
        self._total_bytes += self._held_bytes
        self._held, self._held_bytes = {}, 0

    def _name_parts(self) -> None:
        count = len(self._parts)
        if count == 1:
            (self._aside / "part-1").rename(self._aside / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._parts, start=1):
            file = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self._aside / f"part-{number}").rename(self._aside / file)
            weight_map |= dict.fromkeys(names, file)
        self._write_json(
            "model.safetensors.index.json",
            {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map},
        )

    def _config(self, hf: HFModelConfig) -> dict[str, object]:
        # transformers before 5 calls the field torch_dtype.
        field = "torch_dtype" if "torch_dtype" in hf.raw and "dtype" not in hf.raw else "dtype"
        return hf.raw | {field: self._dtype}

    def _write_json(self, name: str, content: dict[str, object]) -> None:
        (self._aside / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
