"""A training module lent to inference, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SEQUENCE_PARALLEL = ("sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def ready_for_inference(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode without sequence parallelism, until the block ends.

    One decoded token cannot be split over a sequence, and Megatron's static batching refuses to try. The
    weights are the same either way. (Megatron's own ``set_model_to_sequence_parallel`` remembers modules by
    their address and cannot put back what it changed.)
    """
    training = [m for m in module.modules() if m.training]
    switched = [
        (owner, name)
        for owner in _modules_and_configs(module)
        for name in _SEQUENCE_PARALLEL
        if getattr(owner, name, None) is True
    ]
    try:
        module.eval()
        for owner, name in switched:
            setattr(owner, name, False)
        yield
    finally:
        for owner, name in switched:
            setattr(owner, name, True)
        for m in training:
            m.training = True


def _modules_and_configs(module: torch.nn.Module) -> list[Any]:
    modules = list(module.modules())
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    return [*modules, *configs.values()]
