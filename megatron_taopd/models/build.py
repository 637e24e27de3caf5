"""Build this rank's part of a model and fill it with weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig

from megatron_taopd.errors import ConfigError, ModelError
from megatron_taopd.models.fp8 import accept_any_length
from megatron_taopd.models.gpt import DistillationGPTModel
from megatron_taopd.models.hf_config import HFModelConfig, load_hf_config
from megatron_taopd.models.source import is_megatron_checkpoint
from megatron_taopd.models.transformer_config import build_transformer_config
from megatron_taopd.platform import device, distributed
from megatron_taopd.platform.layout import ParallelConfig

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class LoadedModel:
    """A model of this rank: what it is, how Megatron sees it, and the modules themselves."""

    hf: HFModelConfig
    config: TransformerConfig
    modules: list[DistillationGPTModel]
    """This rank's part: one module, or one a virtual pipeline stage."""

    @property
    def module(self) -> DistillationGPTModel:
        """The last of them, which has the LM head on the last pipeline stage."""
        return self.modules[-1]


def pad_vocab_size(*vocab_sizes: int, tp: int, multiple: int = 128) -> int:
    """Rows of the embedding and LM head, the same for all models given so that their shards line up.

    As in Megatron, the largest vocabulary rounded up to a multiple of ``multiple * tp``.

    Args:
        vocab_sizes: real vocabularies of the models.
        tp: tensor-parallel size.
        multiple: rows of a shard are a multiple of it, which suits matrix products.
    """
    step = multiple * tp
    return -(-max(vocab_sizes) // step) * step


def build_model(
    hf: HFModelConfig,
    config: TransformerConfig,
    *,
    padded_vocab_size: int,
    pre_process: bool | None = None,
    post_process: bool | None = None,
    head: bool = True,
    vp_stage: int | None = None,
) -> DistillationGPTModel:
    """This rank's stage or one of its virtual stages, on this machine's device, its weights not yet filled.

    Args:
        pre_process: has the embedding; default: on the first pipeline stage.
        post_process: has the final norm and the LM head; default: on the last.
        head: False leaves the LM head out.
        vp_stage: which of the virtual stages; None: there is one.

    Raises:
        ConfigError: the padded vocabulary is too small or does not divide by the tensor-parallel size.
    """
    tensor = config.tensor_model_parallel_size
    if padded_vocab_size < hf.vocab_size or padded_vocab_size % tensor:
        raise ConfigError(
            f"padded vocabulary {padded_vocab_size} must be at least the {hf.vocab_size} ids of {hf.path} "
            f"and a multiple of the tensor-parallel size {tensor}"
        )
    module = DistillationGPTModel(
        config,
        hf,
        padded_vocab_size=padded_vocab_size,
        pre_process=distributed.is_first_stage(vp_stage) if pre_process is None else pre_process,
        post_process=distributed.is_last_stage(vp_stage) if post_process is None else post_process,
        head=head,
        vp_stage=vp_stage,
    )
    _mark_sharded_parameters(module)
    return module.to(device())


def _mark_sharded_parameters(module: DistillationGPTModel) -> None:
    """Tell the gradient norm which parameters are shards; without the mark it counts rank 0's only.

    Megatron sets it while it draws random weights, which is skipped here.
    """
    for part in module.modules():
        if isinstance(part, (VocabParallelEmbedding, ColumnParallelLinear)):
            sharded = {"weight": 0, "bias": 0}
        elif isinstance(part, RowParallelLinear):
            sharded = {"weight": 1}
        else:
            continue
        for name, dim in sharded.items():
            parameter = getattr(part, name, None)
            if isinstance(parameter, torch.nn.Parameter):
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
                parameter.partition_dim = dim  # type: ignore[attr-defined]
                parameter.partition_stride = 1  # type: ignore[attr-defined]
    # Experts are reduced over ranks of their own. Megatron marks them at EP > 1 only; marked always, they are right at
    # any ETP, and the optimizer has the same parts at every layout, so that its state loads at any other.
    for name, parameter in module.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False


def load_model(
    source: str | Path,
    parallel: ParallelConfig,
    *,
    hf: HFModelConfig | None = None,
    params_dtype: torch.dtype,
    padded_vocab_size: int | None = None,
    trainable: bool,
    overrides: dict[str, Any] | None = None,
    head: bool = True,
) -> LoadedModel:
    """Build a model at this rank's place and load its weights. Collective over all ranks.

    Args:
        source: an HF directory or a Megatron checkpoint directory.
        parallel: the layout that :func:`platform.distributed.initialize` was given.
        hf: what the model is (default: the configuration in ``source``).
        params_dtype: of the weights; whatever the file holds is converted.
        padded_vocab_size: default: the model's own vocabulary padded by :func:`pad_vocab_size`.
        trainable: in training mode with gradients; otherwise in eval mode without.
        overrides: further TransformerConfig fields.
        head: False leaves the LM head out; see :func:`load_head`.

    Raises:
        ModelError: the directory, a tensor or its values are unusable, or there are tensors that the configuration has
            no place for; the same error on every rank.
        ConfigError: the layout does not divide the model, or Megatron refuses the settings.
    """
    # Conversion is a room above this one.
    from megatron_taopd.convert.health import inspect, merged, refuse_unusable
    from megatron_taopd.convert.load import load_hf_weights, refuse_other_tensors

    hf = hf or load_hf_config(source)
    if trainable and hf.experts is not None and parallel.tensor_model_parallel_size > 1:
        if not parallel.sequence_parallel:
            raise ConfigError(
                f"{hf.path} has experts: at --tensor-model-parallel-size {parallel.tensor_model_parallel_size} "
                "megatron-core trains them with --sequence-parallel only; set that flag"
            )
    config = build_transformer_config(hf, parallel, params_dtype=params_dtype, **(overrides or {}))
    if not is_megatron_checkpoint(source):
        refuse_other_tensors(hf)
    padded = padded_vocab_size or pad_vocab_size(hf.vocab_size, tp=parallel.tensor_model_parallel_size)
    virtual = config.virtual_pipeline_model_parallel_size
    modules = [
        build_model(hf, config, padded_vocab_size=padded, head=head, vp_stage=vp_stage)
        for vp_stage in ([None] if virtual is None else range(virtual))
    ]
    logger.info("loading %s (%s, %d layers)", source, hf.family, hf.num_layers)
    report, error = None, None
    if is_megatron_checkpoint(source):
        from megatron_taopd.checkpoint import load_model_weights

        load_model_weights(source, modules)
        report = merged([inspect(module, hf) for module in modules])
    else:
        try:
            report = merged([load_hf_weights(module, hf) for module in modules])
        except ModelError as failure:
            error = failure
    refuse_unusable(str(source), report, error)
    for module in modules:
        module.train(trainable)
        if not trainable:
            module.requires_grad_(False)
    if config.fp8 and not trainable:
        accept_any_length(modules)
    return LoadedModel(hf=hf, config=config, modules=modules)


def load_head(source: str | Path, *, params_dtype: torch.dtype, padded_vocab_size: int) -> torch.Tensor | None:
    """This rank's rows of a model's LM head alone. Collective over all ranks.

    Returns:
        [padded vocabulary / TP, H] on this machine's device, cut by the layout in force; None off its last stage.

    Raises:
        ModelError: a file or the tensor is missing or unusable; the same error on every rank.
        CheckpointError: a Megatron checkpoint is missing, torn or of another model.
    """
    from megatron_taopd.convert.health import WeightReport, refuse_unusable
    from megatron_taopd.convert.load import load_hf_head

    hf = load_hf_config(source)
    weight, report, error = None, WeightReport(), None
    if distributed.is_last_stage():
        rows = padded_vocab_size // distributed.tensor_parallel_size()
        weight = torch.zeros(rows, hf.hidden_size, dtype=params_dtype, device=device())
    if is_megatron_checkpoint(source):
        from megatron_taopd.checkpoint import load_head_weight

        load_head_weight(source, weight, tied=hf.tied, vocab_size=hf.vocab_size)
        if weight is not None:
            report.see("output_layer.weight", weight)
    elif weight is not None:
        try:
            load_hf_head(weight, hf, report)
        except ModelError as failure:
            error = failure
    refuse_unusable(str(source), report, error)
    return weight
