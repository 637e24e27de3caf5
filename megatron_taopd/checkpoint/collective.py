"""An error that one rank meets is raised by all of them, so that nobody waits in a collective."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from megatron_taopd.errors import CheckpointError


def raise_together(message: str | None) -> None:
    """Raise CheckpointError on every rank if any rank brings a message. Collective."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for found in messages:
        if found is not None:
            raise CheckpointError(found)


def on_rank_zero(action: Callable[[], None]) -> None:
    """Run ``action`` on rank 0 while the others wait; file and user errors are raised on every rank."""
    message: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except CheckpointError as error:
            message[0] = str(error)
        except OSError as error:
            message[0] = f"cannot write or read the checkpoint: {error}"
    dist.broadcast_object_list(message, src=0)
    if message[0] is not None:
        raise CheckpointError(message[0])
