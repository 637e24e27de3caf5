"""What one rank finds out, or fails at, is known to all, so that nobody waits in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from megatron_taopd.errors import TaopdError
from megatron_taopd.platform import distributed

Value = TypeVar("Value")


def raise_together(message: str | None, kind: type[TaopdError]) -> None:
    """Raise an error on every rank if any rank brings a message, the lowest one's. Collective."""
    messages: list[str | None] = [message] * distributed.world_size()
    if distributed.world_size() > 1:
        dist.all_gather_object(messages, message)
    for found in messages:
        if found is not None:
            raise kind(found)


def from_rank_zero(make: Callable[[], Value]) -> Value:
    """What ``make()`` gives on rank 0, on every rank. Collective.

    Raises:
        TaopdError: raised on rank 0; the same on every rank. After another failure of rank 0 the others raise
            RuntimeError, instead of waiting for it.
    """
    if distributed.world_size() == 1:
        return make()
    box: list[object] = [None, None]
    failure: Exception | None = None
    if distributed.is_rank_zero():
        try:
            box[0] = make()
        except Exception as error:
            failure = error
            box[1] = error if isinstance(error, TaopdError) else RuntimeError(f"rank 0 failed: {error!r}")
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    if isinstance(box[1], Exception):
        raise box[1]
    return cast(Value, box[0])
