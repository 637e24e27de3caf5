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
        write_companions(self._aside, hf, source_dir, self._dtype)
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
        names = [weight_file_name(number, len(self._parts)) for number in range(len(self._parts))]
        for number, name in enumerate(names):
            (self._aside / f"part-{number + 1}").rename(self._aside / name)
        if len(names) > 1:
            weight_map = {tensor: name for name, part in zip(names, self._parts, strict=True) for tensor in part}
            write_weight_index(self._aside, weight_map, self._total_bytes)


def weight_file_name(number: int, count: int) -> str:
    """Name of a weight file, counted from 0, of ``count``."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_weight_index(directory: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    """Say which of several weight files holds each tensor."""
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
    )


def write_companions(directory: Path, hf: HFModelConfig, source_dir: Path, dtype: str) -> None:
    """Configuration, and the tokenizer and generation files of ``source_dir``.

    Args:
        dtype: of the weights, as config.json calls it.
    """
    # transformers before 5 calls the field torch_dtype.
    field = "torch_dtype" if "torch_dtype" in hf.raw and "dtype" not in hf.raw else "dtype"
    _write_json(directory / "config.json", hf.raw | {field: dtype})
    for source in sorted(source_dir.iterdir()):
        if not source.name.startswith(_COPIED) or source.suffix == ".py":
            continue
        if source.is_dir():
            shutil.copytree(source, directory / source.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, directory / source.name)


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
