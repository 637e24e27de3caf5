"""The mapping table seen from a checkpoint: whole tensors under the keys of Megatron's distributed format.

megatron-core stacks the tensors of like layers into one of its keys: ``decoder.layers.mlp.linear_fc2.weight`` has the
shape [layers, H, F] and one chunk a layer, and those of experts [layers, experts, H, F]. Where layers differ (some have
experts, some have not) each has keys of its own, ``decoder.layers.3.…``. Norms bear the names they have in Transformer
Engine's fused layers, whichever layers a model is built of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_taopd.convert.mapping import Layout, Shard, Sliceable, Vocabulary, named, rules
from megatron_taopd.models.hf_config import HFModelConfig

_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_EXPERT_NORM = "decoder.layers.{layer}.pre_mlp_layernorm.weight"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where a tensor of one layer, or of one expert, is in a checkpoint."""

    key: str
    place: tuple[int, ...]
    """Its coordinates in the stacked tensor; () if the key is its own."""
    counts: tuple[int, ...]
    """Of layers and experts under the key."""


@dataclass(frozen=True, kw_only=True)
class FullTensor:
    """One tensor of Megatron's model, as a single tensor-parallel rank would hold it, and what it is made of."""

    part: Part
    others: tuple[Part, ...]
    """Further names under which Megatron's users may have saved it."""
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    layout: Layout
    hf: HFModelConfig

    @property
    def is_vocabulary(self) -> bool:
        """Embedding or head: large, padded with rows of zeros, and made of one tensor."""
        return isinstance(self.layout, Vocabulary)

    def blocks(self, max_bytes: int, itemsize: int) -> int:
        """In how many blocks of rows to store it, so that no block is much larger than ``max_bytes``.

        Only the vocabulary's matrices are ever cut, into a power of two that divides the rows.
        """
        count = 1
        while (
            self.is_vocabulary
            and self.shape[0] % (2 * count) == 0
            and math.prod(self.shape) * itemsize // count > max_bytes
        ):
            count *= 2
        return count

    def build(self, sources: tuple[Sliceable, ...], block: int = 0, blocks: int = 1) -> torch.Tensor:
        """The tensor, or one block of its rows, reading no more of ``sources`` than it needs."""
        assert blocks == 1 or self.is_vocabulary
        return self.layout.cut(sources, Shard(rank=block, size=blocks), self.hf, self.shape[0])

    def split(self, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The HF tensors, in the order of ``hf_names``."""
        return self.layout.join([value], self.hf)


def full_tensors(hf: HFModelConfig, padded_vocab_size: int) -> Iterator[FullTensor]:
    """Every tensor of the model, in the order of the forward pass."""
    like_layers = hf.experts is None or all(hf.experts.layers)
    for layer, rule in rules(hf):
        fused = rule.fused
        if rule.megatron == _EXPERT_NORM and layer is not None and hf.has_experts(layer):
            fused = None  # before experts the norm is a module of its own
        shapes = rule.layout.shapes(hf)
        empty = tuple(torch.empty(shape, device="meta") for shape in shapes)
        whole = rule.layout.cut(empty, Shard(rank=0, size=1), hf, padded_vocab_size)
        first, *others = _parts(rule.megatron, fused, layer, hf, stacked=like_layers)
        yield FullTensor(
            part=first,
            others=tuple(others),
            shape=tuple(whole.shape),
            hf_names=tuple(named(template, layer) for template in rule.hf),
            hf_shapes=shapes,
            layout=rule.layout,
            hf=hf,
        )


def _parts(plain: str, fused: str | None, layer: int | None, hf: HFModelConfig, *, stacked: bool) -> list[Part]:
    """Names of a tensor: the one that is written first, then others that are understood."""
    if layer is None:
        return [Part(key=plain, place=(), counts=())]
    found = []
    expert = _LOCAL_EXPERT.search(plain)
    names = [plain] if fused is None or expert else [fused, plain]
    for stack in (stacked, not stacked):
        for name in names:
            place: tuple[int, ...] = (layer,) if stack else ()
            counts: tuple[int, ...] = (hf.num_layers,) if stack else ()
            key = name.replace("{layer}.", "") if stack else named(name, layer)
            if expert:
                place, counts = (*place, int(expert.group(1))), (*counts, hf.num_experts)
                key = _LOCAL_EXPERT.sub(".experts.", key)
            found.append(Part(key=key, place=place, counts=counts))
    return found
