"""The parameters of this rank, each with its place in the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_taopd.convert.mapping import Rule, rule_for
from megatron_taopd.models.hf_config import HFModelConfig
from megatron_taopd.platform import distributed

if TYPE_CHECKING:
    from megatron_taopd.models.gpt import DistillationGPTModel


def parameters_with_rules(
    module: DistillationGPTModel, hf: HFModelConfig
) -> Iterator[tuple[str, torch.nn.Parameter, int | None, Rule]]:
    """Name on this rank, parameter, layer in the whole model (None outside layers) and rule."""
    layer_offset = get_transformer_layer_offset(module.config, module.vp_stage)
    expert_offset = 0
    if hf.experts is not None:
        expert_offset = hf.num_experts // distributed.expert_parallel_size() * distributed.expert_parallel_rank()
    for name, parameter in module.named_parameters():
        layer, rule = rule_for(name, hf, layer_offset, expert_offset)
        yield name, parameter, layer, rule
