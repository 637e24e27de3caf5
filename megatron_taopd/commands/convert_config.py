"""Flags of ``taopd convert``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_taopd.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(flag: str, text: str) -> int:
    """Bytes that ``text`` means: a number, or one followed by KB, MB, GB, KiB, MiB or GiB.

    Raises:
        ConfigError: it means nothing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = None if match is None else _UNITS.get(match.group(2).upper())
    if match is None or unit is None or (size := int(float(match.group(1)) * unit)) < 1:
        raise ConfigError(f"{flag} {text!r} is no size; write it like 5GB, 500MB or 2GiB")
    return size


@dataclass(kw_only=True)
class OutputConfig:
    """What is written, and how."""

    output: str
    """Directory to make. It appears when it is complete; until then the work is in a hidden directory beside it, where
    the same command takes it up again after an interruption."""
    overwrite: bool = False
    """Replace --output, if it is an earlier model of the same kind, once the new one is complete (default: an existing
    directory is refused)."""
    dtype: Dtype | None = None
    """Type of the weights (default: each tensor keeps the type it has in --source)."""


@dataclass(kw_only=True)
class HFToMegatronConfig:
    """A Hugging Face directory to a Megatron checkpoint (torch_dist), which loads at any parallel layout."""

    source: str
    """Hugging Face directory with safetensors."""
    writing: OutputConfig
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary with rows of zeros to a multiple of this, as Megatron's flag does. Loading does not depend on
    it: rows of padding are cut or added as a layout needs."""
    max_shard_size: str = "2GB"
    """Size of a data file: what is done again after an interruption."""

    def __post_init__(self) -> None:
        parse_size("--max-shard-size", self.max_shard_size)
        if self.make_vocab_size_divisible_by < 1:
            raise ConfigError(f"--make-vocab-size-divisible-by {self.make_vocab_size_divisible_by} must be at least 1")


@dataclass(kw_only=True)
class MegatronToHFConfig:
    """A Megatron checkpoint (torch_dist, saved at any parallel layout) to a Hugging Face directory."""

    source: str
    """Megatron checkpoint: its root, whose newest iteration is taken, or one of its iter_* directories."""
    writing: OutputConfig
    hf_source: str | None = None
    """Hugging Face directory with config.json and tokenizer, for a checkpoint that keeps none (default: the hf/
    directory inside the checkpoint)."""
    max_shard_size: str = "5GB"
    """Size at which the next safetensors file is begun."""

    def __post_init__(self) -> None:
        parse_size("--max-shard-size", self.max_shard_size)


@dataclass(kw_only=True)
class VerifyPromptsConfig:
    """What both models read."""

    prompts: str | None = None
    """JSONL file of prompts (`prompt`, `messages` or `prompt_tokens`); default: built-in texts if there is a tokenizer,
    and a run of token ids from all over the vocabulary."""
    max_tokens: int = 256
    """Longer prompts are cut to this many tokens; also the length of the built-in run of ids."""

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ConfigError(f"--max-tokens {self.max_tokens} must be at least 2")


@dataclass(kw_only=True)
class VerifyConfig:
    """Compare a model with its Hugging Face original: tensors, configuration, and logits against transformers."""

    hf: str
    """The original: Hugging Face directory, run by transformers (code that comes with it is never run)."""
    model: str
    """Megatron checkpoint or Hugging Face directory, run by this project's model."""
    reading: VerifyPromptsConfig = field(default_factory=VerifyPromptsConfig)
    dtype: Dtype = "float32"
    """Both models compute in this type."""
    tolerance: float = 1e-3
    """Largest difference of a logit that passes; the exit status is 1 above it. Raise it for bfloat16."""
    tensors: bool = True
    """Compare tensor by tensor as well; one that differs after rounding to the stored type fails."""
    allow_tensor_differences: bool = False
    """Pass with tensors that differ: for a model that was trained, held against the one it began as. They are reported,
    and logits (see --tolerance) and settings decide."""

    def __post_init__(self) -> None:
        if self.allow_tensor_differences and not self.tensors:
            raise ConfigError("--allow-tensor-differences has no effect with --no-tensors; drop one of them")
        if not self.tolerance > 0:
            raise ConfigError(f"--tolerance {self.tolerance} must be above 0")
