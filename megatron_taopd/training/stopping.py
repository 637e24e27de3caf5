"""Reasons to end a run before its last iteration, agreed on by all ranks between two steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_taopd.checkpoint_config import CheckpointConfig
from megatron_taopd.platform import device

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopping:
    """Inside the ``with`` block stop signals are only noted; without ``--save`` they end the process as ever."""

    def __init__(self, config: CheckpointConfig) -> None:
        self.config = config
        self.started = time.monotonic()
        self.received = 0
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        if self.config.save is not None and threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def reason(self, iteration: int, *, steps_made: int) -> str | None:
        """Why all ranks stop before the next step, if they do. Collective.

        Args:
            steps_made: by this process.
        """
        if self.config.save is None:
            return None
        interval, minutes = self.config.exit_interval, self.config.exit_duration_in_mins
        overdue = minutes is not None and time.monotonic() - self.started > 60 * minutes
        asked = torch.tensor([self.received, int(overdue)], device=device())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        received, overdue = asked.tolist()
        if received:
            return f"{signal.Signals(received).name} was received"
        if overdue and steps_made:  # a run that starts late makes a step all the same, or it would never end
            return f"--exit-duration-in-mins {minutes:g} is over"
        if interval is not None and steps_made and iteration % interval == 0:
            return f"--exit-interval {interval}"
        return None
