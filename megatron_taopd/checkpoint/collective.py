"""Files of a checkpoint that rank 0 reads or writes for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron_taopd.errors import CheckpointError
from megatron_taopd.platform.together import from_rank_zero

Result = TypeVar("Result")


def on_rank_zero(action: Callable[[], Result]) -> Result:
    """:func:`from_rank_zero`, with the system's error about a file as a CheckpointError. Collective."""

    def attempt() -> Result:
        try:
            return action()
        except OSError as error:
            raise CheckpointError(f"cannot write or read the checkpoint: {error}") from error

    return from_rank_zero(attempt)
