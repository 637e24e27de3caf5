"""Bytes that collectives bring to a rank, counted where they are called.

A ring moves the least there is, and the counts assume one: an all-gather brings every other rank's tensor, an
all-reduce 2 (P - 1) / P of its tensor, a reduce-scatter (P - 1) of its output, a broadcast the tensor once, and an
all-to-all of equal parts every other rank's part of the output.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed

_NOT_CALLERS = ("megatron_taopd.ops.collectives", "megatron_taopd.testing")


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _all_reduce(ranks: int, tensor: torch.Tensor, *_: Any, **__: Any) -> float:
    return 2 * (ranks - 1) / ranks * _size(tensor)


def _all_gather(ranks: int, outputs: list[torch.Tensor], tensor: torch.Tensor, *_: Any, **__: Any) -> float:
    return (ranks - 1) * _size(tensor)


def _all_gather_into_tensor(ranks: int, output: torch.Tensor, tensor: torch.Tensor, *_: Any, **__: Any) -> float:
    return (ranks - 1) * _size(tensor)


def _reduce_scatter_tensor(ranks: int, output: torch.Tensor, tensor: torch.Tensor, *_: Any, **__: Any) -> float:
    return (ranks - 1) * _size(output)


def _all_to_all_single(ranks: int, output: torch.Tensor, tensor: torch.Tensor, *_: Any, **__: Any) -> float:
    return (ranks - 1) / ranks * _size(output)


def _broadcast(ranks: int, tensor: torch.Tensor, *_: Any, **__: Any) -> float:
    return float(_size(tensor))


_COUNTED: dict[str, Callable[..., float]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather_into_tensor,
    "reduce_scatter_tensor": _reduce_scatter_tensor,
    "all_to_all_single": _all_to_all_single,
    "broadcast": _broadcast,
}
_REFUSED = ("reduce_scatter", "all_to_all", "gather", "scatter", "reduce", "send", "recv")


class Wire:
    """Traffic by caller: calls and received bytes."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = defaultdict(int)
        self.received: dict[str, float] = defaultdict(float)

    @property
    def total(self) -> float:
        return sum(self.received.values())

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count every collective of torch.distributed that is called inside."""
        originals = {name: getattr(torch.distributed, name) for name in (*_COUNTED, *_REFUSED)}
        try:
            for name, cost in _COUNTED.items():
                setattr(torch.distributed, name, self._counted(originals[name], cost))
            for name in _REFUSED:
                setattr(torch.distributed, name, _refuse(name))
            yield
        finally:
            for name, original in originals.items():
                setattr(torch.distributed, name, original)

    def _counted(self, original: Callable[..., Any], cost: Callable[..., float]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            ranks = torch.distributed.get_world_size(kwargs.get("group"))
            caller = _caller(original.__name__)
            self.calls[caller] += 1
            self.received[caller] += cost(ranks, *args, **kwargs)
            return original(*args, **kwargs)

        return call


def _refuse(name: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"torch.distributed.{name} was called, whose bytes are not counted; add it to wire.py"
        )

    return call


def _caller(collective: str) -> str:
    """The function of this project that asked, below the helpers that all of them share."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("megatron_taopd.") and not module.startswith(_NOT_CALLERS):
            return f"{module.removeprefix('megatron_taopd.')}.{frame.f_code.co_name} ({collective})"
        frame = frame.f_back
    return f"elsewhere ({collective})"
