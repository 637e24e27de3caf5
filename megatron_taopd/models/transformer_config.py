"""HF configuration and rank layout -> Megatron's TransformerConfig."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_taopd.errors import ConfigError
from megatron_taopd.models.hf_config import HFModelConfig
from megatron_taopd.platform import has_cuda
from megatron_taopd.platform.layout import ParallelConfig


def have_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported here."""
    return importlib.util.find_spec("transformer_engine") is not None


def use_transformer_engine() -> bool:
    """Whether layers are Transformer Engine's: it is installed and there is a CUDA device."""
    return has_cuda() and have_transformer_engine()


def build_transformer_config(
    hf: HFModelConfig, parallel: ParallelConfig, *, params_dtype: torch.dtype, **overrides: Any
) -> TransformerConfig:
    """Megatron's description of ``hf`` at this layout.

    Args:
        params_dtype: of weights and activations: float32, bfloat16 or float64 (tests).
        overrides: further TransformerConfig fields, such as ``recompute_granularity`` or ``fp8``.

    Raises:
        ConfigError: the layout does not divide the model, fp8 without Transformer Engine, or a setting that
            Megatron refuses.
    """
    check_layout(hf, parallel)
    _refuse_fp8_in_vain(overrides)
    # The fused kernels are CUDA's; the local layers use none of them.
    fused = use_transformer_engine()
    settings: dict[str, Any] = dict(
        **_expert_settings(hf, parallel, params_dtype),
        num_layers=hf.num_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.ffn_size,
        num_attention_heads=hf.num_heads,
        num_query_groups=hf.num_kv_heads,
        kv_channels=hf.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        qk_layernorm=hf.qk_norm,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=hf.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.num_virtual_stages_per_pipeline_rank,
        # As in Megatron's own training script: between two ranks, batched messages of virtual stages would be mixed up.
        overlap_p2p_comm=parallel.num_virtual_stages_per_pipeline_rank is not None,
        batch_p2p_comm=parallel.num_virtual_stages_per_pipeline_rank is None,
        context_parallel_size=parallel.context_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        account_for_embedding_in_pipeline_split=parallel.account_for_embedding_in_pipeline_split,
        account_for_loss_in_pipeline_split=parallel.account_for_loss_in_pipeline_split,
        sequence_parallel=parallel.sequence_parallel,
        # The loss is a sum over kept tokens; Megatron divides the gradient once by their global count.
        calculate_per_token_loss=True,
        # Weights are always loaded, so drawing random ones first would only cost time.
        perform_initialization=False,
        use_cpu_initialization=not has_cuda(),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        cuda_graph_scope=[],
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        persist_layer_norm=fused,
    )
    try:
        return TransformerConfig(**(settings | overrides))
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"megatron-core refuses this model configuration: {error}") from error


def _expert_settings(hf: HFModelConfig, parallel: ParallelConfig, params_dtype: torch.dtype) -> dict[str, Any]:
    """Fields of the mixture; none for a model without experts, whose ranks then share nothing over EP."""
    if hf.experts is None:
        return {}
    layers = [int(layer) for layer in hf.experts.layers]
    return dict(
        num_moe_experts=hf.experts.num_experts,
        moe_ffn_hidden_size=hf.experts.ffn_size,
        moe_router_topk=hf.experts.experts_per_token,
        # A softmax over the chosen experts is a softmax over all, divided by the sum over the chosen.
        moe_router_pre_softmax=not hf.experts.normalize,
        # Of bf16 logits many are equal, and layouts would disagree about which experts they choose.
        moe_router_dtype="fp32" if params_dtype == torch.bfloat16 else None,
        moe_aux_loss_coeff=0.0,
        moe_layer_freq=1 if all(layers) else layers,
        # Unlike allgather it lets replicas bring different numbers of tokens.
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=use_transformer_engine(),
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
    )


def refuse_expert_layout_in_vain(parallel: ParallelConfig, *models: HFModelConfig) -> None:
    """Refuse expert parallelism where none of the models of a run has experts.

    Raises:
        ConfigError: the flag would have no effect.
    """
    if any(hf.experts is not None for hf in models):
        return
    for flag, value in (
        (parallel.flag("expert_model_parallel_size"), parallel.expert_model_parallel_size),
        (parallel.flag("expert_tensor_parallel_size"), parallel.expert_tensor_parallel_size or 1),
    ):
        if value > 1:
            names = " and ".join(str(hf.path) for hf in models)
            raise ConfigError(f"{flag} {value} has no effect: no experts in {names}; drop it")


def check_layout(hf: HFModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a layout that does not divide ``hf``.

    Raises:
        ConfigError: names the first count that does not divide and the sizes that would.
    """
    tensor = parallel.tensor_model_parallel_size
    tensor_flag = parallel.flag("tensor_model_parallel_size")
    counts = [
        (tensor_flag, tensor, "attention heads", hf.num_heads),
        (tensor_flag, tensor, "key-value heads", hf.num_kv_heads),
    ]
    if hf.experts is None or not all(hf.experts.layers):
        counts.append((tensor_flag, tensor, "ffn rows (intermediate_size)", hf.ffn_size))
    if hf.experts is not None:
        expert_tensor = parallel.expert_tensor_parallel_size or tensor
        counts += [
            (
                parallel.flag("expert_model_parallel_size"),
                parallel.expert_model_parallel_size,
                "experts",
                hf.experts.num_experts,
            ),
            (
                parallel.flag("expert_tensor_parallel_size"),
                expert_tensor,
                "ffn rows of an expert (moe_intermediate_size)",
                hf.experts.ffn_size,
            ),
        ]
    for flag, size, what, count in counts:
        if count % size:
            raise ConfigError(
                f"{flag} {size} does not divide the {count} {what} of {hf.path}; "
                f"sizes that divide {count}: {_divisors(count)}"
            )
    _check_stages(hf, parallel)


def _check_stages(hf: HFModelConfig, parallel: ParallelConfig) -> None:
    stages, layers = parallel.pipeline_model_parallel_size, hf.num_layers
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    first_flag, last_flag = (parallel.flag(f"decoder_{end}_pipeline_num_layers") for end in ("first", "last"))
    fixed = [layers_of_stage for layers_of_stage in (first, last) if layers_of_stage is not None]
    if fixed:
        rest, stages_left = layers - sum(fixed), stages - len(fixed)
        if rest < stages_left or (rest % stages_left if stages_left else rest):
            raise ConfigError(
                f"{first_flag} {first} and {last_flag} {last} leave {rest} of the {layers} layers of {hf.path} to "
                f"{stages_left} stages, which must be dealt evenly"
            )
        _check_pieces(hf, parallel, {*fixed, *([rest // stages_left] if stages_left else [])})
        return
    stages_flag = parallel.flag("pipeline_model_parallel_size")
    counted = parallel.account_for_embedding_in_pipeline_split + parallel.account_for_loss_in_pipeline_split
    if (layers + counted) % stages:
        with_extra = f", with {counted} counted for embedding or loss," if counted else ""
        raise ConfigError(
            f"{stages_flag} {stages} does not divide the {layers + counted} layers of {hf.path}"
            f"{with_extra}; sizes that divide {layers + counted}: {_divisors(layers + counted)}, or give "
            f"{first_flag} or {last_flag}"
        )
    _check_pieces(hf, parallel, {(layers + counted) // stages})
    if counted and (layers + counted) // stages < 2:
        raise ConfigError(
            f"{stages_flag} {stages} leaves a stage without any of the {layers} layers of {hf.path}; "
            "lower it, or do not account for embedding and loss"
        )


def _check_pieces(hf: HFModelConfig, parallel: ParallelConfig, shares: set[int]) -> None:
    """Virtual stages divide each stage's share, in which embedding or loss may be counted."""
    virtual = parallel.num_virtual_stages_per_pipeline_rank or 1
    for share in sorted(shares):
        if share % virtual:
            raise ConfigError(
                f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size} gives a stage {share} of the "
                f"{hf.num_layers} layers of {hf.path} (embedding or loss included, where they are counted), which "
                f"--num-virtual-stages-per-pipeline-rank {virtual} does not divide; sizes that divide {share}: "
                f"{_divisors(share)}"
            )


def _divisors(count: int) -> str:
    return ", ".join(str(size) for size in range(1, min(count, 256) + 1) if count % size == 0)


def _refuse_fp8_in_vain(overrides: dict[str, Any]) -> None:
    settings = {name: value for name, value in overrides.items() if name.startswith("fp8") and value}
    if not settings or use_transformer_engine():
        return
    missing = "CUDA device" if have_transformer_engine() else "Transformer Engine"
    named = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    raise ConfigError(
        f"fp8 needs Transformer Engine on a CUDA device and here is no {missing}: megatron-core would ignore "
        f"{named} in silence; install the 'te' extra on a GPU machine or drop the fp8 settings"
    )
