"""HF weights into this rank's Megatron module; every rank reads only its own slices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron_taopd.convert.health import WeightReport
from megatron_taopd.convert.hf_reader import HFReader
from megatron_taopd.convert.mapping import Shard, named, rule_for, rules
from megatron_taopd.convert.parameters import parameters_with_rules
from megatron_taopd.models.hf_config import HFModelConfig
from megatron_taopd.platform import distributed
from megatron_taopd.platform.together import from_rank_zero

if TYPE_CHECKING:
    from megatron_taopd.models.gpt import DistillationGPTModel


def refuse_other_tensors(hf: HFModelConfig) -> None:
    """Refuse weight files with tensors that the configuration has no place for. Collective; rank 0 reads the headers.

    Such files are of another model than config.json says: biases that would be left out, layers past the last, a head
    beside the embedding it should be tied to.

    Raises:
        ModelError: names a tensor and its file; the same error on every rank. A file is missing or no safetensors.
    """

    def look() -> None:
        known = {named(template, layer) for layer, rule in rules(hf) for template in rule.hf}
        HFReader(hf.path).refuse_others(known, tied=hf.tied)

    from_rank_zero(look)


def load_hf_weights(module: DistillationGPTModel, hf: HFModelConfig) -> WeightReport:
    """Fill every parameter of ``module`` from the safetensors files of ``hf``, converted to its type.

    Args:
        module: this rank's stage, at its place in the current model-parallel layout.
        hf: where the weights are.

    Returns:
        What the values read looked like, by HF tensor name; see :func:`health.refuse_unusable`.

    Raises:
        ModelError: a tensor is missing, has another shape than the configuration implies, or cannot be read.
    """
    reader = HFReader(hf.path)
    shard = Shard(rank=distributed.tensor_parallel_rank(), size=distributed.tensor_parallel_size())
    expert_shard = Shard(rank=distributed.expert_tensor_parallel_rank(), size=distributed.expert_tensor_parallel_size())
    report = WeightReport()
    for name, parameter, layer, rule in parameters_with_rules(module, hf):
        names = [named(template, layer) for template in rule.hf]
        sources = tuple(
            report.watch(source_name, reader.slice(source_name, shape))
            for source_name, shape in zip(names, rule.layout.shapes(hf), strict=True)
        )
        value = rule.layout.cut(sources, expert_shard if rule.of_expert else shard, hf, module.vocab_size)
        if value.shape != parameter.shape:
            raise RuntimeError(f"{name}: converted {tuple(value.shape)}, module has {tuple(parameter.shape)}")
        with torch.no_grad():
            parameter.copy_(value)
    return report


def load_hf_head(weight_VH: torch.Tensor, hf: HFModelConfig, report: WeightReport) -> None:
    """Fill this rank's rows of the LM head, tied or not, from the safetensors files of ``hf``.

    Args:
        weight_VH: [padded vocabulary / TP, H].
        report: what was read is noted there.

    Raises:
        ModelError: as :func:`load_hf_weights`.
    """
    _, rule = rule_for("output_layer.weight", hf, layer_offset=0)
    ((name,), (shape,)) = rule.hf, rule.layout.shapes(hf)
    source = report.watch(name, HFReader(hf.path).slice(name, shape))
    shard = Shard(rank=distributed.tensor_parallel_rank(), size=distributed.tensor_parallel_size())
    weight_VH.copy_(rule.layout.cut((source,), shard, hf, weight_VH.shape[0] * shard.size))
