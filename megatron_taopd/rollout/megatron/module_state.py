"""A training module lent to inference, and given back as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig

from megatron_taopd.rollout.megatron.products import linear


@contextmanager
def ready_for_inference(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode without sequence and context parallelism, and products without autograd, until the block ends.

    A module in training generates without FP8, too: the FP8 layers of training take no single tokens.

    One decoded token cannot be split over a sequence, and Megatron's static batching refuses to try. The
    weights are the same either way. (Megatron's own ``set_model_to_sequence_parallel`` remembers modules by
    their address and cannot put back what it changed.)
    """
    training = [m for m in module.modules() if m.training]
    switched = [
        (owner, name, getattr(owner, name), value)
        for owner in _modules_and_configs(module)
        for name, value in _alone(owner).items()
    ]
    if module.training:
        switched += [(c, "fp8", c.fp8, None) for c in _configs(module) if c.fp8]
    parallel_linears = [m for m in module.modules() if isinstance(m, (ColumnParallelLinear, RowParallelLinear))]
    try:
        module.eval()
        for m in parallel_linears:
            m._forward_impl = linear
        for owner, name, _, value in switched:
            setattr(owner, name, value)
        yield
    finally:
        for m in parallel_linears:
            vars(m).pop("_forward_impl", None)
        for owner, name, before, _ in switched:
            setattr(owner, name, before)
        for m in training:
            m.training = True


def _alone(owner: Any) -> dict[str, Any]:
    """Attributes, with the value by which a module or a configuration reads whole sequences on its own."""
    values: dict[str, Any] = {}
    for name in ("sequence_parallel", "reduce_scatter_embeddings"):
        if getattr(owner, name, None) is True:
            values[name] = False
    if getattr(owner, "context_parallel_size", 1) > 1:
        values["context_parallel_size"] = 1
    if getattr(owner, "context_group", None) is not None:
        values["context_group"] = None
    if hasattr(owner, "set_context_parallel_group"):  # Transformer Engine's attention
        values["cp_group"] = None
    rotary = getattr(owner, "rotary_pos_emb", None)
    group = getattr(rotary, "cp_group", None)
    if group is not None and group.size() > 1:
        # Another object, because Megatron remembers angles by object and length, whatever its ``cp_group`` is now.
        values["rotary_pos_emb"] = copy.copy(rotary)
        values["rotary_pos_emb"].cp_group = None
    return values


def _modules_and_configs(module: torch.nn.Module) -> list[Any]:
    return [*module.modules(), *_configs(module)]


def _configs(module: torch.nn.Module) -> list[TransformerConfig]:
    return list({id(m.config): m.config for m in module.modules() if hasattr(m, "config")}.values())
