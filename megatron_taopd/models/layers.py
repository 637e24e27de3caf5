"""Layer specs: local torch modules that run anywhere, or Transformer Engine's where it and CUDA are there.

S sequence, B batch, A query heads and G key-value heads of this rank, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_taopd.errors import ConfigError
from megatron_taopd.models.context import context_attention, packed_attention
from megatron_taopd.models.sample_cache import CachedSelfAttention
from megatron_taopd.models.transformer_config import use_transformer_engine


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose weight gradient Megatron completes under sequence parallelism.

    Each rank then sees its part of the sequence only; ``finalize_model_grads`` sums the gradients of
    parameters that carry the attribute ``sequence_parallel``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.normalized_shape = (hidden_size,)
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return torch.nn.functional.rms_norm(hidden, self.normalized_shape, self.weight, self.eps)


class CoreAttention(MegatronModule):
    """Causal attention on ``scaled_dot_product_attention``, in the place of Megatron's own.

    The mask follows from the lengths: as many queries as keys are causal; fewer queries are the last ones
    of the keys (decoding with a cache), so the mask is aligned to the bottom right. ``attn_mask_type`` is not
    read: past the first decoded token Megatron's engine passes no_mask whatever the model.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        if config.attention_dropout or attention_dropout:
            raise ConfigError("attention_dropout must be 0 with the local layers")
        self.softmax_scale = softmax_scale
        self.context_group = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None, "Megatron hands its process groups to the attention"
            self.context_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [S_q, B, A, D].
            key: [S_k, B, G, D]; each serves A/G query heads.
            value: [S_k, B, G, D].
            attention_mask: of a forward with :class:`SampleCache`: broadcasts to [B, A, S_q, S_k], True where a key
                is hidden; it then says all. None: the lengths say it, see the class.
            packed_seq_params: sequences that lie end to end, without B; see :func:`packed_attention`.

        Returns:
            [S_q, B, A*D]; [S_q, A*D] of packed sequences.
        """
        if attention_bias is not None:
            raise NotImplementedError("the local attention has no attention bias")
        group, scale = self.context_group, self.softmax_scale
        if packed_seq_params is not None:
            return packed_attention(query, key, value, packed_seq_params, group=group, scale=scale)
        if group is not None:
            if attention_mask is not None:
                raise NotImplementedError("the local attention has no mask of its own under context parallelism")
            return context_attention(query, key, value, group=group, scale=scale)
        length_q, length_k = query.shape[0], key.shape[0]
        visible = None
        if attention_mask is not None:
            visible = ~attention_mask
        elif 1 < length_q < length_k:
            visible = torch.ones(length_q, length_k, dtype=torch.bool, device=query.device).tril(length_k - length_q)
        # [S, B, heads, D] -> [B, heads, S, D]
        context = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=visible,
            is_causal=visible is None and length_q == length_k and length_q > 1,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return context.permute(2, 0, 1, 3).reshape(length_q, query.shape[1], -1)


def decoder_spec(
    config: TransformerConfig, *, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """Layers and final norm of this rank's stage."""
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage, pp_rank))
    if use_transformer_engine():
        return _transformer_engine_spec(config, layers)
    return TransformerBlockSubmodules(
        layer_specs=[_local_layer_spec(config, experts=_has_experts(config, layer)) for layer in layers],
        layer_norm=RMSNorm,
    )


def _has_experts(config: TransformerConfig, layer: int) -> bool:
    """Whether this layer of the whole model is a mixture of experts."""
    if isinstance(config.moe_layer_freq, list):
        return bool(config.moe_layer_freq[layer])
    return config.num_moe_experts is not None


def _local_layer_spec(config: TransformerConfig, *, experts: bool) -> ModuleSpec:
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    ffn = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    # Checkpoint names of Megatron's fused layers, so that both kinds of layer read one checkpoint. The norm before
    # a mixture is a module of its own there as well.
    fused_names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if experts:
        mixture = MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=ffn))
        mlp = ModuleSpec(module=MoELayer, submodules=mixture)
    else:
        mlp = ModuleSpec(module=MLP, submodules=ffn)
        fused_names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=CachedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=CoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=fused_names,
        ),
    )


def _transformer_engine_spec(config: TransformerConfig, layers: range) -> TransformerBlockSubmodules:
    """Transformer Engine's layers, needed for fp8; experts as one grouped product. Not yet run on a GPU."""
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    specs = [
        get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts if _has_experts(config, layer) else None,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        for layer in layers
    ]
    for spec in specs:
        spec.submodules.self_attention.module = CachedSelfAttention
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=TENorm)
