"""How many parameters a model has, from its configuration alone. Nothing is built and nothing here imports Megatron."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_taopd.models.hf_config import HFModelConfig


@dataclass(frozen=True, kw_only=True)
class LayerParameters:
    """Parameters of one decoder layer."""

    attention: int
    """Its four matrices, their biases, and the norms of queries and keys."""
    norms: int
    """The norms before attention and ffn."""
    ffn: int
    """The ffn of a dense layer; the router of a mixture."""
    experts: int
    """All experts of a mixture; 0 in a dense layer."""
    experts_of_a_token: int
    """Those experts that one token passes through."""

    @property
    def dense(self) -> int:
        """All but the experts: what expert parallelism does not share out."""
        return self.attention + self.norms + self.ffn


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model, without any padding of the vocabulary."""

    embedding: int
    head: int
    """The LM head; 0 where the embedding serves as one."""
    final_norm: int
    layers: tuple[LayerParameters, ...]

    @property
    def total(self) -> int:
        """Every parameter, a tied embedding once."""
        outside = self.embedding + self.head + self.final_norm
        return outside + sum(layer.dense + layer.experts for layer in self.layers)

    @property
    def active(self) -> int:
        """Those that one token passes through: of a mixture the chosen experts alone."""
        return self.total - sum(layer.experts - layer.experts_of_a_token for layer in self.layers)


def count_parameters(hf: HFModelConfig) -> ParameterCount:
    """Count the parameters of the model that ``hf`` describes."""
    vocabulary = hf.vocab_size * hf.hidden_size
    return ParameterCount(
        embedding=vocabulary,
        head=0 if hf.tied else vocabulary,
        final_norm=hf.hidden_size,
        layers=tuple(_layer(hf, layer) for layer in range(hf.num_layers)),
    )


def _layer(hf: HFModelConfig, layer: int) -> LayerParameters:
    qkv_size = (hf.num_heads + 2 * hf.num_kv_heads) * hf.head_dim
    attention = hf.hidden_size * (qkv_size + hf.all_heads_size)
    if hf.qkv_bias:
        attention += qkv_size
    if hf.qk_norm:
        attention += 2 * hf.head_dim
    ffn, experts, experts_of_a_token = 3 * hf.hidden_size * hf.ffn_size, 0, 0
    if hf.experts is not None and hf.has_experts(layer):
        expert = 3 * hf.hidden_size * hf.experts.ffn_size
        ffn = hf.hidden_size * hf.experts.num_experts
        experts, experts_of_a_token = hf.experts.num_experts * expert, hf.experts.experts_per_token * expert
    return LayerParameters(
        attention=attention,
        norms=2 * hf.hidden_size,
        ffn=ffn,
        experts=experts,
        experts_of_a_token=experts_of_a_token,
    )
