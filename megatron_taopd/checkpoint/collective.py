"""An error that one rank meets is raised by all of them, so that nobody waits in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_taopd.errors import CheckpointError, TaopdError

Result = TypeVar("Result")


def raise_together(message: str | None, kind: type[TaopdError] = CheckpointError) -> None:
    """Raise an error on every rank if any rank brings a message. Collective."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for found in messages:
        if found is not None:
            raise kind(found)


def on_rank_zero(action: Callable[[], Result]) -> Result:
    """What ``action`` answers on rank 0, on every rank; file and user errors are raised on every rank. Collective."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except CheckpointError as error:
            outcome[0] = error
        except OSError as error:
            outcome[0] = CheckpointError(f"cannot write or read the checkpoint: {error}")
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], CheckpointError):
        raise outcome[0]
    return outcome[0]
