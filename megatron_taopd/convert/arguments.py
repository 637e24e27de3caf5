"""A model's architecture in the words of Megatron's command line, as its checkpoints keep it."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron_taopd.models.hf_config import HFModelConfig


def megatron_arguments(
    hf: HFModelConfig, padded_vocab_size: int, *, make_vocab_size_divisible_by: int = 128
) -> Namespace:
    """What ``--use-checkpoint-args`` of Megatron reads, and ``padded_vocab_size`` with the multiple that gave it."""
    values: dict[str, Any] = dict(
        num_layers=hf.num_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.ffn_size,
        num_attention_heads=hf.num_heads,
        group_query_attention=hf.num_kv_heads != hf.num_heads,
        num_query_groups=hf.num_kv_heads,
        kv_channels=hf.head_dim,
        seq_length=hf.max_position_embeddings,
        max_position_embeddings=hf.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=False,
        use_rotary_position_embeddings=True,
        rotary_base=hf.rope_theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        add_bias_linear=False,
        add_qkv_bias=hf.qkv_bias,
        qk_layernorm=hf.qk_norm,
        swiglu=True,
        squared_relu=False,
        untie_embeddings_and_output_weights=not hf.tied,
        normalization="RMSNorm",
        norm_epsilon=hf.rms_norm_eps,
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        vocab_size=hf.vocab_size,
        padded_vocab_size=padded_vocab_size,
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        ckpt_format="torch_dist",
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )
    scaling = hf.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        values["rotary_seq_len_interpolation_factor"] = scaling["factor"]
    elif scaling.get("rope_type") == "llama3":
        values |= dict(use_rope_scaling=True, rope_scaling_factor=scaling["factor"])
    if hf.experts is not None:
        layers = [int(layer) for layer in hf.experts.layers]
        values |= dict(
            num_experts=hf.experts.num_experts,
            moe_ffn_hidden_size=hf.experts.ffn_size,
            moe_router_topk=hf.experts.experts_per_token,
            moe_router_pre_softmax=not hf.experts.normalize,
            moe_router_score_function="softmax",
            moe_layer_freq=1 if all(layers) else layers,
        )
    return Namespace(**values)
