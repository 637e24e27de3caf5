"""FP8 layers: what is refused before a model is loaded, and what a model that is only read needs for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from megatron_taopd.errors import ConfigError
from megatron_taopd.fp8_config import Fp8Settings, refuse_delayed_without_training
from megatron_taopd.fp8_support import find_fp8_support
from megatron_taopd.models.hf_config import HFModelConfig
from megatron_taopd.platform.layout import ParallelConfig


def fp8_fields(
    settings: Fp8Settings | None, hf: HFModelConfig, parallel: ParallelConfig, *, trained: bool
) -> dict[str, Any]:
    """Fields of TransformerConfig for these settings; none without FP8.

    Raises:
        ConfigError: the settings do not fit the model, its layout, or this machine.
    """
    if settings is None:
        return {}
    if not trained:
        refuse_delayed_without_training(settings)
    _check_layers(settings, hf, parallel)
    _check_sides(settings, hf, parallel)
    obstacle = find_fp8_support().obstacle(settings.recipe)
    if obstacle is not None:
        raise ConfigError(
            f"{settings.flag} needs FP8 layers of Transformer Engine (recipe {settings.recipe}), and {obstacle}. "
            "Without them megatron-core would ignore the setting in silence; drop it (taopd doctor tells what is here; "
            "an FP8 head alone, --score-head-precision fp8, needs no Transformer Engine)"
        )
    return settings.transformer_fields()


def _check_layers(settings: Fp8Settings, hf: HFModelConfig, parallel: ParallelConfig) -> None:
    most = hf.num_layers // parallel.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        count = settings.further.get(name, 1 if settings.further.get("first_last_layers_bf16") else 0)
        if count > most:
            raise ConfigError(
                f"{settings.prefix}{name.replace('_', '-')} {count} is more than the {most} layers of a stage of "
                f"{hf.path}; lower it"
            )


def _check_sides(settings: Fp8Settings, hf: HFModelConfig, parallel: ParallelConfig) -> None:
    multiple, tensor = settings.alignment, parallel.tensor_model_parallel_size
    for name, rows, columns in matrices_of_a_rank(hf, parallel):
        for what, size in (("outputs", rows), ("inputs", columns)):
            if size % multiple:
                raise ConfigError(
                    f"{settings.flag}: Transformer Engine multiplies matrices whose sides are multiples of {multiple} "
                    f"({settings.prefix}fp8-recipe {settings.recipe}), and {name} of {hf.path} has {size} {what} a "
                    f"rank at {parallel.flag('tensor_model_parallel_size')} {tensor}; change that or drop the flag"
                )


def matrices_of_a_rank(hf: HFModelConfig, parallel: ParallelConfig) -> Iterator[tuple[str, int, int]]:
    """Name, outputs and inputs of each matrix of a layer that a rank holds."""
    tensor = parallel.tensor_model_parallel_size
    heads = hf.num_heads * hf.head_dim // tensor
    yield "linear_qkv", heads + 2 * hf.num_kv_heads * hf.head_dim // tensor, hf.hidden_size
    yield "linear_proj", hf.hidden_size, heads
    if hf.experts is None or not all(hf.experts.layers):
        yield "linear_fc1", 2 * hf.ffn_size // tensor, hf.hidden_size
        yield "linear_fc2", hf.hidden_size, hf.ffn_size // tensor
    if hf.experts is not None:
        ffn = hf.experts.ffn_size // (parallel.expert_tensor_parallel_size or tensor)
        yield "linear_fc1 of an expert", 2 * ffn, hf.hidden_size
        yield "linear_fc2 of an expert", hf.hidden_size, ffn


def accept_any_length(modules: Iterable[torch.nn.Module]) -> None:
    """Let FP8 layers of a model that is not trained read any number of tokens: Megatron pads their input."""
    from megatron.core.fp8_utils import prepare_model_for_fp8_inference

    for module in modules:
        prepare_model_for_fp8_inference(module)
