"""Activations that a training forward keeps for its backward: those of the local layers, tensor by tensor.

Layers of Transformer Engine keep fewer (fused norms and SwiGLU), so that this is an upper bound for them.
"""

from __future__ import annotations

from megatron_taopd.models.hf_config import HFModelConfig
from megatron_taopd.plan.parameters import stage_layers
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.run_config import RecomputeConfig


def activation_bytes(
    hf: HFModelConfig,
    parallel: ParallelConfig,
    recompute: RecomputeConfig,
    *,
    stage: int,
    tokens: int,
    in_flight: float,
    size: int,
) -> int:
    """Bytes kept by the micro-batches that are between forward and backward on a stage.

    Args:
        tokens: of a micro-batch, over all context-parallel ranks.
        in_flight: micro-batches (with virtual stages in parts) between forward and backward.
        size: bytes of an activation.
    """
    layers = stage_layers(hf, parallel, stage)
    full = [layer_bytes(hf, parallel, layer, tokens=tokens, size=size) for layer in layers]
    border = hidden_bytes(hf, parallel, tokens=tokens, size=size)
    last = stage == parallel.pipeline_model_parallel_size - 1
    norm = 2 * border if last else 0
    if recompute.recompute_granularity == "full":
        group = recompute.recompute_num_layers or 1
        # While a piece runs again, everything of its layers is there.
        if recompute.recompute_method == "uniform":
            pieces = -(-len(full) // group)
            return round((pieces * border + norm) * in_flight) + sum(sorted(full)[-group:])
        return round((border * min(group, len(full)) + sum(full[group:]) + norm) * in_flight) + max(full)
    # Selective: the core attention runs again, which keeps nothing beyond its operands and its result as it is.
    return round((sum(full) + norm) * in_flight)


def hidden_bytes(hf: HFModelConfig, parallel: ParallelConfig, *, tokens: int, size: int) -> int:
    """Hidden states between two layers."""
    return tokens // parallel.context_parallel_size * hf.hidden_size * size // _sequence_shares(parallel)


def layer_bytes(hf: HFModelConfig, parallel: ParallelConfig, layer: int, *, tokens: int, size: int) -> int:
    """What one layer keeps without recomputation."""
    tensor = parallel.tensor_model_parallel_size
    tokens //= parallel.context_parallel_size
    hidden = hf.hidden_size / _sequence_shares(parallel)
    q, kv = hf.all_heads_size / tensor, hf.num_kv_heads * hf.head_dim / tensor
    return round(tokens * size * (_norm(hidden) + _attention(hf, q, kv) + _norm(hidden) + _ffn(hf, parallel, layer)))


def _norm(hidden: float) -> float:
    # Its input, the input scaled, and what the next product reads.
    return 3 * hidden


def _attention(hf: HFModelConfig, q: float, kv: float) -> float:
    # The first product's output (values are read there), turned queries and keys, attention's output; norms of queries
    # and keys keep a copy of the queries and both scaled.
    return 3 * q + 3 * kv + (2 * q + kv if hf.qk_norm else 0)


def _ffn(hf: HFModelConfig, parallel: ParallelConfig, layer: int) -> float:
    # Gate and up side by side, a copy of one of them, the activated gate, and the product that the second matrix reads.
    tensor = parallel.tensor_model_parallel_size
    if hf.experts is None or not hf.has_experts(layer):
        return 5 * hf.ffn_size / tensor
    expert_tensor = parallel.expert_tensor_parallel_size or tensor
    each = hf.hidden_size * 2 + 5 * hf.expert_ffn_size / expert_tensor
    # Evenly loaded experts: a rank works on as many token copies as it brings, times the shares of its experts.
    return hf.experts.experts_per_token * each / (_sequence_shares(parallel) / expert_tensor)


def working_bytes(hf: HFModelConfig, parallel: ParallelConfig, *, tokens: int, size: int) -> int:
    """The widest tensor of a layer that is not kept, beside its gradient: the gathered input and gate and up."""
    tensor = parallel.tensor_model_parallel_size
    width = max(hf.ffn_size, hf.all_heads_size) / tensor
    return round(tokens / parallel.context_parallel_size * size * (hf.hidden_size + 4 * width))


def _sequence_shares(parallel: ParallelConfig) -> int:
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
