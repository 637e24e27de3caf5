"""Lets megatron-core run where there is no CUDA device.

megatron-core takes CUDA for granted: it creates tensors on ``cuda``, asks for streams, events and the CUDA
random state, and compares ``Tensor.type()`` with CUDA names. :func:`install` answers each of these on the
CPU. It touches factory functions and a few methods once, so that an operator call costs nothing extra.

What it replaces stays valid for everyone else: a factory differs only when it is asked for a CUDA device (an
error otherwise), and ``Tensor.type()`` answers with the CUDA spelling to Megatron alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _device as torch_device_mode

from megatron_taopd.platform import cpu_collectives

logger = logging.getLogger(__name__)

_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace",
    "ones", "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros",
    "zeros_like",
)  # fmt: skip

_EXPECTED_WARNINGS = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "When using .*CUDA_DEVICE_MAX_CONNECTIONS",
    r"`torch\.distributed\.\w+` is deprecated",
)

_installed = False


def install() -> None:
    """Install the adaptor in this process. Idempotent.

    Best before Megatron is first imported, whose import is then faster; afterwards it works as well.

    Raises:
        RuntimeError: a CUDA device is there.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU adaptor must not be installed where a CUDA device is available")
    _installed = True
    _adapt_factories()
    _adapt_tensor_methods()
    _adapt_cuda_namespace()
    _adapt_megatron()


def _on_cpu(device: Any) -> Any:
    """The CPU for every way of naming a CUDA device; other devices as they are."""
    names_cuda = isinstance(device, (str, torch.device)) and str(device).startswith("cuda")
    return torch.device("cpu") if names_cuda or isinstance(device, int) else device


def _adapt_factories() -> None:
    # ``with torch.device(...)`` recognises factories by identity and remembers them at the first call.
    torch_device_mode._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _factory_on_cpu(getattr(torch, name)))


def _factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            # Pinning needs an accelerator; memory of the CPU is as near as it gets.
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def _adapt_tensor_methods() -> None:
    plain_type = torch.Tensor.type

    def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None or args or kwargs:
            return plain_type(self, dtype, *args, **kwargs)
        name = plain_type(self)
        # The optimizers and gradient clipping tell parameters apart by these spellings.
        if _called_from_megatron():
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    def to_cuda(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self

    methods = {"type": tensor_type, "cuda": to_cuda, "pin_memory": to_cuda, "record_stream": to_cuda}
    for name, method in methods.items():
        setattr(torch.Tensor, name, method)
    torch.nn.Module.cuda = to_cuda  # type: ignore[method-assign]


def _called_from_megatron() -> bool:
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return caller.startswith("megatron.")


class Stream:
    """Stands for a CUDA stream: work on the CPU is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")
        self.cuda_stream = 0

    def synchronize(self) -> None:
        """Nothing is outstanding."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing is outstanding."""

    def wait_event(self, event: Any) -> None:
        """Nothing is outstanding."""

    def query(self) -> bool:
        """All work is done."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """An event recorded now."""
        event = event or Event()
        event.record()
        return event


class Event:
    """Stands for a CUDA event: remembers the wall-clock time at which it was recorded."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._recorded_at = 0.0

    def record(self, stream: Any = None) -> None:
        """Remember the time."""
        self._recorded_at = time.perf_counter()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to ``end_event``."""
        return (end_event._recorded_at - self._recorded_at) * 1000.0

    def synchronize(self) -> None:
        """Nothing is outstanding."""

    def wait(self, stream: Any = None) -> None:
        """Nothing is outstanding."""

    def query(self) -> bool:
        """All work is done."""
        return True


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.default_generator.set_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _no_op() -> Callable[..., None]:
    # A new function each time: torch.compile's tables refuse one object under two names.
    def do_nothing(*args: Any, **kwargs: Any) -> None:
        return None

    return do_nothing


def _adapt_cuda_namespace() -> None:
    stream = Stream()
    replacements: dict[str, Any] = {
        "current_device": lambda: torch.device("cpu"),
        "set_device": _no_op(),
        "synchronize": _no_op(),
        "empty_cache": _no_op(),
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *args, **kwargs: stream,
        "default_stream": lambda *args, **kwargs: stream,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": _manual_seed,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    for name in ("get_rng_state", "set_rng_state", "manual_seed"):
        setattr(torch.cuda.random, name, replacements[name])
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _no_op())


def _adapt_megatron() -> None:
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    with _without_compiling():
        importlib.import_module("megatron.core")
    importlib.import_module("megatron.core.jit").disable_jit_fuser()
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    _replace(random, "_get_cuda_rng_state", _get_rng_state)
    _replace(random, "_set_cuda_rng_state", _set_rng_state)
    # Pipeline-parallel inference asserts CUDA tensors before it sends them.
    communication = importlib.import_module("megatron.core.inference.communication_utils")
    _replace(communication, "_is_cuda", _no_op())
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        # Without Transformer Engine 0.16 leaves the name undefined and then asks whether it is None.
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    _replace(dispatcher, "maybe_move_tensor_to_cpu", cpu_collectives.numbers_of_tokens)
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    for name, of_any_sizes in (
        ("_gather_along_first_dim", cpu_collectives.gather_of_any_sizes),
        ("_reduce_scatter_along_first_dim", cpu_collectives.reduce_scatter_of_any_sizes),
    ):
        _replace(mappings, name, of_any_sizes(getattr(mappings, name)))


@contextlib.contextmanager
def _without_compiling() -> Iterator[None]:
    """Megatron's fuser is ``torch.compile``: slow to import, and on a CPU it wants a C++ compiler."""
    compiled = torch.compile
    torch.compile = lambda function, *args, **kwargs: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiled


def _replace(module: types.ModuleType, name: str, value: Any) -> None:
    if hasattr(module, name):
        setattr(module, name, value)
    else:
        logger.warning("%s.%s, which the CPU adaptor replaces, is not there", module.__name__, name)
