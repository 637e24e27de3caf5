"""Ends a run that hangs, and says which rank holds it up.

A thread of each rank watches its main thread: one that has finished no piece of work for most of
``--distributed-timeout-minutes`` is waiting for another rank, or is stuck itself. What the ranks are at goes through
the process group's store, so that each can tell who does not answer any more and who is busy while the others wait.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from megatron_taopd.exit_status import FAILED, HUNG
from megatron_taopd.platform import distributed, progress

SHARE_OF_TIMEOUT = 0.8
"""Ahead of the collectives' own time-out, which names nobody."""

NOT_ANSWERING = "What the other ranks are at is not known: the process that keeps the store does not answer."

_WAITING = ("torch/distributed/", "pipeline_parallel/p2p_communication.py")
_PACKAGES = ("megatron_taopd", "megatron")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a rank is at."""

    tick: int
    """Grows while the rank's process runs at all."""
    iteration: int
    phase: str
    waits: bool
    """In a collective, for others."""
    place: str

    def __str__(self) -> str:
        doing = "waits for others" if self.waits else "is busy"
        return f"iteration {self.iteration}, {self.phase}: {doing} in {self.place}"


class Watchdog:
    """Watches this process while the ``with`` block runs.

    Args:
        timeout: seconds of the collectives' time-out.
        parent: the process that started this one, which ends with it; None where it may outlive that one.
    """

    def __init__(self, timeout: float, *, parent: int | None) -> None:
        self.parent = parent
        self.limit = SHARE_OF_TIMEOUT * timeout
        self.interval = min(max(self.limit / 50, 0.2), 10.0)
        self.main = threading.main_thread()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.tick = 0
        self.store = _own_store(timedelta(seconds=5 * self.interval + 1)) if self.world_size > 1 else None

    def __enter__(self) -> Watchdog:
        self._publish()
        if self.store is not None:
            dist.barrier()  # all ranks have a report from here on
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stopped.set()
        self.thread.join()

    def _watch(self) -> None:
        beats, since = progress.current.beats, time.monotonic()
        while not self.stopped.wait(self.interval):
            self._publish()
            if self.parent is not None and os.getppid() != self.parent:
                # Nobody would end this rank any more, and a run that is started again would meet it in its files.
                _end(f"taopd: rank {self.rank} ends, as the process that started it is gone", FAILED)
            if progress.current.beats != beats:
                beats, since = progress.current.beats, time.monotonic()
            elif time.monotonic() - since > self.limit:
                self._give_up(time.monotonic() - since, beats)
                beats, since = progress.current.beats, time.monotonic()

    def _give_up(self, idle: float, beats: int) -> None:
        """End the process, unless it goes on after all."""
        first = self._reports()
        silence = 3 * self.interval
        while not self.stopped.wait(self.interval) and silence > 0:
            self._publish()
            silence -= self.interval
        if self.stopped.is_set() or progress.current.beats != beats:
            return
        reports = self._reports() or {self.rank: self._report()}
        silent = [rank for rank, report in first.items() if rank in reports and reports[rank].tick == report.tick]
        about_others = describe(reports, silent) if len(reports) == self.world_size else NOT_ANSWERING
        text = (
            f"taopd: rank {self.rank} has finished nothing for {idle:.0f} s: {reports[self.rank]}\n{about_others}\n"
            "The run ends here and goes on from its last checkpoint. If nothing is wrong and a piece of work takes this"
            " long, raise --distributed-timeout-minutes."
        )
        if not reports[self.rank].waits:
            frames = traceback.format_stack(sys._current_frames().get(self.main.ident or 0))
            text += f"\ntaopd: rank {self.rank} is here:\n{''.join(frames)}"
        # Ranks that wait for this one shall find the same, not a connection that is gone.
        _end(text, HUNG, linger=0.0 if reports[self.rank].waits else 3 * self.interval)

    def _publish(self) -> None:
        self.tick += 1
        if self.store is None:
            return
        try:
            self.store.set(f"taopd/watchdog/{self.rank}", json.dumps(asdict(self._report())))
        except RuntimeError:
            pass  # the process that keeps the store is gone, which the collectives will notice

    def _report(self) -> Report:
        waits, place = _where(sys._current_frames().get(self.main.ident or 0))
        now = progress.current
        return Report(tick=self.tick, iteration=now.iteration, phase=now.phase, waits=waits, place=place)

    def _reports(self) -> dict[int, Report]:
        """Of all ranks; empty if the store does not answer."""
        if self.store is None:
            return {}
        try:
            texts = self.store.multi_get([f"taopd/watchdog/{rank}" for rank in range(self.world_size)])
        except RuntimeError:
            return {}
        return {rank: Report(**json.loads(text)) for rank, text in enumerate(texts)}


def describe(reports: Mapping[int, Report], silent: Sequence[int]) -> str:
    """Who holds up a run: ranks that do not answer any more, else ranks that are busy while others wait."""
    lines = []
    if silent:
        lines.append(f"No sign of life from {_ranks(silent)} (stopped, out of memory, or their machine is gone).")
    busy = [rank for rank, report in reports.items() if not report.waits and rank not in silent]
    if not silent and busy and len(busy) < len(reports):
        lines.append(f"The others wait for {_ranks(busy)}.")
    groups: dict[str, list[int]] = {}
    for rank, report in reports.items():
        groups.setdefault(str(report), []).append(rank)
    lines += [f"  {_ranks(ranks)}: {state}" for state, ranks in sorted(groups.items(), key=lambda group: len(group[1]))]
    return "\n".join(lines)


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:16]))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{', …' if len(ranks) > 16 else ''}"


def _where(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a stack ends in a collective, and where in these packages."""
    waits = frame is not None and any(part in frame.f_code.co_filename for part in _WAITING)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in _PACKAGES:
            file = Path(frame.f_code.co_filename)
            return waits, f"{file.parent.name}/{file.name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return waits, "no code of Megatron"


def _end(text: str, status: int, linger: float = 0.0) -> None:
    print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(linger)
    os._exit(status)


def _own_store(timeout: timedelta) -> Any:
    """A connection of its own, which the main thread cannot occupy."""
    store: Any = dist.distributed_c10d._get_default_store()
    if hasattr(store, "clone"):  # torch 2.8
        store = store.clone()
        store.set_timeout(timeout)
    return store
