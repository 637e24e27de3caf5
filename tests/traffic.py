"""What is counted in tests: collectives with their payload, and live bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# name -> which argument is what this rank sends
_SENT = {"all_reduce": 0, "all_gather": 1, "broadcast": 0, "all_to_all_single": 1, "reduce_scatter_tensor": 1}

Calls = list[tuple[str, int]]


@contextmanager
def counted_collectives() -> Iterator[Calls]:
    """Name and payload in bytes (what this rank puts in) of every collective that is called inside, in order."""
    calls: Calls = []
    real = {name: getattr(torch.distributed, name) for name in _SENT}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[_SENT[name]]
            calls.append((name, tensor.numel() * tensor.element_size()))
            return real[name](*args, **kwargs)

        return call

    for name in real:
        setattr(torch.distributed, name, counting(name))
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(torch.distributed, name, function)


def peak_live_bytes(run: Callable[[], Any]) -> int:
    """Most bytes of tensors made by ``run`` that lived at once, as torch's profiler counts them."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    live = top = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            top = max(top, live)
    return top
