"""A second layout of the same ranks, for a model that is cut in another way than the first.

Megatron keeps a layout in the module globals of ``parallel_state``, and models, schedules and checkpoints ask there.
A second layout has values of its own for them, which are in force inside a ``with`` block.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megatron_taopd.platform import distributed, enable
from megatron_taopd.platform.layout import ParallelConfig

_GLOBAL = re.compile(r"_[A-Z][A-Z0-9_]*|_global_process_group_list")


class SecondLayout:
    """Groups of a further layout beside the one that :func:`distributed.initialize` made."""

    def __init__(self, config: ParallelConfig) -> None:
        """Make its groups; all ranks call it. They are closed with those of the first layout.

        Raises:
            ConfigError: the layout does not divide the ranks.
        """
        distributed.check_world_size(config)
        self.config = config
        self._values: dict[str, Any] = {
            name: {} if isinstance(value, dict) else None for name, value in _globals().items()
        }
        with self.in_force():
            distributed.lay_out(config)
        distributed.second_layouts.append(self)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside the block this layout is what Megatron and :mod:`distributed` answer; blocks do not nest."""
        first = _globals()
        _put(self._values)
        try:
            yield
        finally:
            self._values = _globals()
            _put(first)

    def groups(self) -> list[dist.ProcessGroup | None]:
        """The groups that this rank belongs to."""
        groups: list[dist.ProcessGroup | None] = self._values["_global_process_group_list"]
        return groups


def _parallel_state() -> types.ModuleType:
    enable()
    from megatron.core import parallel_state

    return parallel_state


def _globals() -> dict[str, Any]:
    return {name: value for name, value in vars(_parallel_state()).items() if _GLOBAL.fullmatch(name)}


def _put(values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(_parallel_state(), name, value)
