"""The conversion table: which HF tensors make a Megatron parameter, and how a rank's shard is cut from them.

A family is a list of :class:`Rule`. Loading and export read the same list, so they cannot drift apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from megatron_taopd.models.hf_config import HFModelConfig


class Sliceable(Protocol):
    """A tensor, or a safetensors slice: ``source[a:b]`` and ``source[:, a:b]`` read that part only."""

    def __getitem__(self, index: slice | tuple[slice, ...]) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Which part of each tensor a rank holds."""

    rank: int
    size: int

    def bounds(self, count: int) -> tuple[int, int]:
        """First and last-plus-one of this rank's ``count / size`` rows."""
        share = count // self.size
        return self.rank * share, (self.rank + 1) * share


class Layout(Protocol):
    """How HF tensors become one Megatron parameter."""

    def shapes(self, hf: HFModelConfig) -> tuple[tuple[int, ...], ...]:
        """Shape of each HF tensor."""
        ...

    def cut(
        self, sources: tuple[Sliceable, ...], shard: Shard, hf: HFModelConfig, padded_vocab_size: int
    ) -> torch.Tensor:
        """This rank's parameter, reading only what it needs."""
        ...

    def join(self, shards: list[torch.Tensor], hf: HFModelConfig) -> tuple[torch.Tensor, ...]:
        """The HF tensors from the parameters of all tensor-parallel ranks, in rank order."""
        ...


@dataclass(frozen=True)
class Replicated:
    """The same tensor on every rank: norm weights, the router of a mixture."""

    sizes: tuple[str, ...]
    """HFModelConfig fields that are its dimensions."""

    def shapes(self, hf: HFModelConfig) -> tuple[tuple[int, ...], ...]:
        """One tensor."""
        return (tuple(getattr(hf, size) for size in self.sizes),)

    def cut(
        self, sources: tuple[Sliceable, ...], shard: Shard, hf: HFModelConfig, padded_vocab_size: int
    ) -> torch.Tensor:
        """All of it."""
        return sources[0][:]

    def join(self, shards: list[torch.Tensor], hf: HFModelConfig) -> tuple[torch.Tensor, ...]:
        """Any rank's."""
        return (shards[0],)


@dataclass(frozen=True)
class Vocabulary:
    """Embedding and LM head: rows dealt to the ranks, filled up with zero rows to the padded vocabulary."""

    def shapes(self, hf: HFModelConfig) -> tuple[tuple[int, ...], ...]:
        """One matrix."""
        return ((hf.vocab_size, hf.hidden_size),)

    def cut(
        self, sources: tuple[Sliceable, ...], shard: Shard, hf: HFModelConfig, padded_vocab_size: int
    ) -> torch.Tensor:
        """The rank's rows of the padded vocabulary."""
        start, stop = shard.bounds(padded_vocab_size)
        real = sources[0][min(start, hf.vocab_size) : min(stop, hf.vocab_size)]
        return torch.nn.functional.pad(real, (0, 0, 0, stop - start - real.shape[0]))

    def join(self, shards: list[torch.Tensor], hf: HFModelConfig) -> tuple[torch.Tensor, ...]:
        """All rows but the padding."""
        return (torch.cat(shards)[: hf.vocab_size],)


@dataclass(frozen=True)
class InputColumns:
    """Attention output and second ffn matrix: the input dimension is dealt to the ranks."""

    size: str
    """HFModelConfig field that is the input dimension."""

    def _inputs(self, hf: HFModelConfig) -> int:
        return int(getattr(hf, self.size))

    def shapes(self, hf: HFModelConfig) -> tuple[tuple[int, ...], ...]:
        """One matrix."""
        return ((hf.hidden_size, self._inputs(hf)),)

    def cut(
        self, sources: tuple[Sliceable, ...], shard: Shard, hf: HFModelConfig, padded_vocab_size: int
    ) -> torch.Tensor:
        """The rank's columns."""
        start, stop = shard.bounds(self._inputs(hf))
        return sources[0][:, start:stop]

    def join(self, shards: list[torch.Tensor], hf: HFModelConfig) -> tuple[torch.Tensor, ...]:
        """Columns side by side."""
        return (torch.cat(shards, dim=1),)


@dataclass(frozen=True)
class GateUp:
    """First ffn matrix: a rank has its gate rows on top of its up rows."""

    size: str
    """HFModelConfig field that is the number of gate rows."""

    def shapes(self, hf: HFModelConfig) -> tuple[tuple[int, ...], ...]:
        """Gate and up."""
        return ((getattr(hf, self.size), hf.hidden_size),) * 2

    def cut(
        self, sources: tuple[Sliceable, ...], shard: Shard, hf: HFModelConfig, padded_vocab_size: int
    ) -> torch.Tensor:
        """Shard first, then join."""
        start, stop = shard.bounds(getattr(hf, self.size))
        return torch.cat([source[start:stop] for source in sources])

    def join(self, shards: list[torch.Tensor], hf: HFModelConfig) -> tuple[torch.Tensor, ...]:
        """Every rank's upper half, then every rank's lower half."""
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])


@dataclass(frozen=True)
class QKV:
    """Query, key and value interleaved: a group's queries, its key, its value, then the next group."""

    bias: bool = False

    def shapes(self, hf: HFModelConfig) -> tuple[tuple[int, ...], ...]:
        """Query, key and value."""
        rows = [heads * hf.head_dim for heads in (hf.num_heads, hf.num_kv_heads, hf.num_kv_heads)]
        return tuple((count,) if self.bias else (count, hf.hidden_size) for count in rows)

    def cut(
        self, sources: tuple[Sliceable, ...], shard: Shard, hf: HFModelConfig, padded_vocab_size: int
    ) -> torch.Tensor:
        """The rank's groups."""
        first, last = shard.bounds(hf.num_kv_heads)
        parts = []
        for source, heads in zip(sources, (hf.num_heads // hf.num_kv_heads, 1, 1), strict=True):
            rows = heads * hf.head_dim
            part = source[first * rows : last * rows]
            parts.append(part.reshape(last - first, rows, *part.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def join(self, shards: list[torch.Tensor], hf: HFModelConfig) -> tuple[torch.Tensor, ...]:
        """All groups' queries, keys and values."""
        whole = torch.cat(shards)
        groups = whole.reshape(hf.num_kv_heads, -1, *whole.shape[1:])
        queries = hf.num_heads // hf.num_kv_heads * hf.head_dim
        parts = groups.split([queries, hf.head_dim, hf.head_dim], dim=1)
        return tuple(part.flatten(0, 1) for part in parts)


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter and the HF tensors it is made of; ``{layer}`` counts over the whole model."""

    megatron: str
    hf: tuple[str, ...]
    layout: Layout
    fused: str | None = None
    """Name in Transformer Engine's layers where norm and matrix, or all experts, are one module."""
    of_expert: bool = False
    """Sharded over the expert-tensor-parallel ranks, on those ranks that hold the expert."""


_ATTENTION, _HF_ATTENTION = "decoder.layers.{layer}.self_attention", "model.layers.{layer}.self_attn"
_MLP, _HF_MLP = "decoder.layers.{layer}.mlp", "model.layers.{layer}.mlp"

_EMBEDDING = Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary())
_FINAL_NORM = Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated(("hidden_size",)))
_HEAD = Rule("output_layer.weight", ("lm_head.weight",), Vocabulary())
_TIED_HEAD = Rule("output_layer.weight", _EMBEDDING.hf, Vocabulary())
_LAYER = (
    Rule(
        "decoder.layers.{layer}.input_layernorm.weight",
        ("model.layers.{layer}.input_layernorm.weight",),
        Replicated(("hidden_size",)),
        fused=f"{_ATTENTION}.linear_qkv.layer_norm_weight",
    ),
    Rule(
        f"{_ATTENTION}.linear_qkv.weight",
        tuple(f"{_HF_ATTENTION}.{name}_proj.weight" for name in "qkv"),
        QKV(),
    ),
    Rule(f"{_ATTENTION}.linear_proj.weight", (f"{_HF_ATTENTION}.o_proj.weight",), InputColumns("all_heads_size")),
    Rule(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        Replicated(("hidden_size",)),
        fused=f"{_MLP}.linear_fc1.layer_norm_weight",
    ),
)
_QK_NORM = (
    Rule(f"{_ATTENTION}.q_layernorm.weight", (f"{_HF_ATTENTION}.q_norm.weight",), Replicated(("head_dim",))),
    Rule(f"{_ATTENTION}.k_layernorm.weight", (f"{_HF_ATTENTION}.k_norm.weight",), Replicated(("head_dim",))),
)
_QKV_BIAS = (
    Rule(
        f"{_ATTENTION}.linear_qkv.bias",
        tuple(f"{_HF_ATTENTION}.{name}_proj.bias" for name in "qkv"),
        QKV(bias=True),
    ),
)
_FFN = (
    Rule(
        f"{_MLP}.linear_fc1.weight",
        (f"{_HF_MLP}.gate_proj.weight", f"{_HF_MLP}.up_proj.weight"),
        GateUp("ffn_size"),
    ),
    Rule(f"{_MLP}.linear_fc2.weight", (f"{_HF_MLP}.down_proj.weight",), InputColumns("ffn_size")),
)
_ROUTER = Rule(f"{_MLP}.router.weight", (f"{_HF_MLP}.gate.weight",), Replicated(("num_experts", "hidden_size")))


def _expert(number: int) -> tuple[Rule, Rule]:
    """One expert, by its number in the whole model."""
    ours, theirs = f"{_MLP}.experts.local_experts.{number}", f"{_HF_MLP}.experts.{number}"
    return (
        Rule(
            f"{ours}.linear_fc1.weight",
            (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"),
            GateUp("expert_ffn_size"),
            fused=f"{_MLP}.experts.linear_fc1.weight{number}",
            of_expert=True,
        ),
        Rule(
            f"{ours}.linear_fc2.weight",
            (f"{theirs}.down_proj.weight",),
            InputColumns("expert_ffn_size"),
            fused=f"{_MLP}.experts.linear_fc2.weight{number}",
            of_expert=True,
        ),
    )


@cache
def _layer_rules(family: str, num_experts: int) -> tuple[Rule, ...]:
    """Rules of a layer; with ``num_experts`` 0 of one that has a single ffn."""
    ffn: tuple[Rule, ...] = _FFN
    if num_experts:
        ffn = (_ROUTER, *(rule for number in range(num_experts) for rule in _expert(number)))
    return _LAYER + FAMILY_RULES[family] + ffn


FAMILY_RULES: dict[str, tuple[Rule, ...]] = {
    "qwen3": _QK_NORM,
    "qwen3_moe": _QK_NORM,
    "qwen2": _QKV_BIAS,
    "llama": (),
    "mistral": (),
}
"""What a layer of the family has beside norms, attention matrices and ffn or experts."""

_LAYER_NUMBER = re.compile(r"(?<=^decoder\.layers\.)\d+(?=\.)")
_EXPERT_NUMBER = re.compile(r"(?<=\.experts\.local_experts\.)\d+(?=\.)|(?<=\.experts\.linear_fc[12]\.weight)\d+$")


def rules(hf: HFModelConfig) -> Iterator[tuple[int | None, Rule]]:
    """Every parameter of the whole model once, in the order of the forward pass, with its layer.

    A tied head is not among them: it is the embedding.
    """
    yield None, _EMBEDDING
    for layer in range(hf.num_layers):
        for rule in layer_rules(hf, layer):
            yield layer, rule
    yield None, _FINAL_NORM
    if not hf.tied:
        yield None, _HEAD


def layer_rules(hf: HFModelConfig, layer: int) -> tuple[Rule, ...]:
    """Every parameter of one layer of the whole model."""
    return _layer_rules(hf.family, hf.num_experts if hf.has_experts(layer) else 0)


def rule_for(name: str, hf: HFModelConfig, layer_offset: int, expert_offset: int = 0) -> tuple[int | None, Rule]:
    """The rule of a parameter as it is called on this rank.

    Args:
        name: from ``named_parameters``; layers count from 0 within the stage, experts within the rank.
        layer_offset: layers before this stage.
        expert_offset: experts before those of this rank.

    Returns:
        The layer in the whole model (None outside layers) and the rule.
    """
    match = _LAYER_NUMBER.search(name)
    layer = None if match is None else int(match.group()) + layer_offset
    pattern = _LAYER_NUMBER.sub("{layer}", name)
    pattern = _EXPERT_NUMBER.sub(lambda number: str(int(number.group()) + expert_offset), pattern)
    head = _TIED_HEAD if hf.tied else _HEAD
    for rule in (_EMBEDDING, _FINAL_NORM, head) if layer is None else layer_rules(hf, layer):
        if pattern in (rule.megatron, rule.fused):
            return layer, rule
    raise RuntimeError(f"no conversion rule for parameter {name!r} of family {hf.family}")


def named(template: str, layer: int | None) -> str:
    """A rule's name with its layer filled in."""
    return template.format(layer=layer)
