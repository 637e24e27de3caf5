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
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
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


def check_layout(hf: HFModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a layout that does not divide ``hf``.

    Raises:
        ConfigError: names the first count that does not divide and the sizes that would.
    """
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for flag, size, what, count in (
        ("--tensor-model-parallel-size", tensor, "attention heads", hf.num_heads),
        ("--tensor-model-parallel-size", tensor, "key-value heads", hf.num_kv_heads),
        ("--tensor-model-parallel-size", tensor, "ffn rows (intermediate_size)", hf.ffn_size),
        ("--pipeline-model-parallel-size", pipeline, "layers", hf.num_layers),
    ):
        if count % size:
            raise ConfigError(
                f"{flag} {size} does not divide the {count} {what} of {hf.path}; "
                f"sizes that divide {count}: {_divisors(count)}"
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
