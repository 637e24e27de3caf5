"""``taopd convert hf-to-megatron | megatron-to-hf | verify``."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from typing import Any

from megatron_taopd.cli import parse
from megatron_taopd.commands.common import announce, configure_logging, ranks
from megatron_taopd.commands.convert_config import HFToMegatronConfig, MegatronToHFConfig, VerifyConfig, parse_size
from megatron_taopd.errors import ConfigError


def convert(words: Sequence[str]) -> int:
    """Dispatch to one of :data:`ACTIONS`; returns the exit status."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name = words[0]
    if name not in ACTIONS:
        near = difflib.get_close_matches(name, ACTIONS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown conversion {name!r}{hint} Available: {', '.join(ACTIONS)}")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ConfigError(
            f"taopd convert works in one process and {world_size} were started; run it without torchrun or srun"
        )
    config_type, action, _ = ACTIONS[name]
    return action(parse(config_type, list(words[1:]), name=f"convert {name}"))


def usage() -> str:
    """The text of ``taopd convert --help``."""
    width = max(map(len, ACTIONS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, _, summary) in ACTIONS.items()]
    return "\n".join(
        [
            "usage: taopd convert ACTION [--config FILE.yaml] [--flags ...]",
            "",
            *lines,
            "",
            "taopd convert ACTION --help explains every flag.",
        ]
    )


def hf_to_megatron(config: HFToMegatronConfig) -> int:
    """A Hugging Face directory to a Megatron checkpoint."""
    from megatron_taopd.convert.to_megatron import convert_to_megatron

    configure_logging()
    announce(config, "taopd convert hf-to-megatron")
    made = convert_to_megatron(
        config.source,
        config.writing.output,
        dtype=_dtype(config.writing.dtype),
        make_vocab_size_divisible_by=config.make_vocab_size_divisible_by,
        max_shard_bytes=parse_size("--max-shard-size", config.max_shard_size),
        overwrite=config.writing.overwrite,
    )
    print(f"> Megatron checkpoint: {made}", flush=True)
    return 0


def megatron_to_hf(config: MegatronToHFConfig) -> int:
    """A Megatron checkpoint to a Hugging Face directory."""
    from megatron_taopd.convert.to_hf import convert_to_hf

    configure_logging()
    announce(config, "taopd convert megatron-to-hf")
    made = convert_to_hf(
        config.source,
        config.writing.output,
        hf_source=config.hf_source,
        dtype=_dtype(config.writing.dtype),
        max_shard_bytes=parse_size("--max-shard-size", config.max_shard_size),
        overwrite=config.writing.overwrite,
    )
    print(f"> Hugging Face directory: {made}", flush=True)
    return 0


def verify(config: VerifyConfig) -> int:
    """Compare a model with its original; 1 if they differ."""
    from megatron_taopd.platform.layout import ParallelConfig

    with ranks(ParallelConfig(), seed=0):
        from megatron_taopd.convert.verify import verify_model

        announce(config, "taopd convert verify")
        verdict = verify_model(
            config.hf,
            config.model,
            prompts=config.reading.prompts,
            max_tokens=config.reading.max_tokens,
            dtype=_dtype(config.dtype),
            tolerance=config.tolerance,
            tensors=config.tensors,
            allow_tensor_differences=config.allow_tensor_differences,
        )
        print(verdict.report(), flush=True)
        return 0 if verdict.passed else 1


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


ACTIONS: dict[str, tuple[type, Callable[[Any], int], str]] = {
    "hf-to-megatron": (HFToMegatronConfig, hf_to_megatron, "Hugging Face directory to Megatron checkpoint"),
    "megatron-to-hf": (MegatronToHFConfig, megatron_to_hf, "Megatron checkpoint to Hugging Face directory"),
    "verify": (VerifyConfig, verify, "compare a model with its original: tensors, and logits against transformers"),
}
