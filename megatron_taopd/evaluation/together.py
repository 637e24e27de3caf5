"""What one rank finds out for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_taopd.errors import TaopdError
from megatron_taopd.platform import distributed

Value = TypeVar("Value")


def from_rank_zero(make: Callable[[], Value]) -> Value:
    """What ``make()`` gives on rank 0, on all ranks; they call it together.

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
    return box[0]  # type: ignore[return-value]
