"""The loop of a suite's processes: claim a run, make it, write its record, until nothing is left to claim."""

from __future__ import annotations

import datetime
import gc
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from megatron_taopd.errors import ConfigError
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.suite import claims
from megatron_taopd.suite.execute import Stopped, describe, execute
from megatron_taopd.suite.measured import ACCURACY
from megatron_taopd.suite.plan import Plan, Run
from megatron_taopd.suite.records import NAME, begin, check_same, read_record, write_json
from megatron_taopd.suite.sweep import chosen_rates, undecided_cells
from megatron_taopd.training.stopping import STOP_SIGNALS

WAIT_SECONDS = 2.0
CONTROL_TIMEOUT = datetime.timedelta(hours=24)


class StopAsked(BaseException):
    """A stop signal came, and nothing has to be written first."""


class RanksApart(ConfigError):
    """A run failed on some ranks of several; their collectives no longer match."""


@dataclass
class Records:
    """What has ended so far; looked up on disk until it is there, as other processes write it."""

    plan: Plan
    retry_before: float | None = None
    """Failures recorded before this time are made again."""
    known: dict[Run, dict[str, Any]] = field(default_factory=dict)

    def look(self, run: Run) -> dict[str, Any] | None:
        """The record of a run, or None where it has not ended (or is to be made again).

        Raises:
            ConfigError: it ended with other settings.
        """
        if run not in self.known:
            directory = self.plan.directory(run)
            record = read_record(directory)
            if record is None:
                return None
            if record["status"] == "failed" and self.retry_before is not None:
                if record["started"] < self.retry_before:
                    return None
            if record["status"] == "finished":
                check_same(record, self.plan.identity(run), directory)
            self.known[run] = record
        return self.known[run]

    def left(self) -> tuple[list[Run], int]:
        """Runs that can be made now, and how many more wait for a learning rate."""
        pending = {run: None for run in self.plan.sweep_runs() if self.look(run) is None}
        chosen = chosen_rates(self.plan, self.look)
        pending |= {run: None for run in self.plan.main_runs(chosen) if self.look(run) is None}
        undecided = undecided_cells(self.plan, chosen, self.look)
        return list(pending), len(undecided) * len(self.plan.seeds_of_undecided)

    def failed(self) -> int:
        """Runs that ended with an error, whoever made them."""
        return sum(record["status"] == "failed" for record in self.known.values())


class Runner:
    """Rank 0 claims and records; all ranks make the runs together."""

    def __init__(self, plan: Plan, *, retry_failed: bool = False) -> None:
        self.plan = plan
        self.started = time.time()
        self.records = Records(plan, retry_before=self.started if retry_failed else None)
        self.seconds: list[float] = []
        self.failed = 0
        """Of the suite's runs, those that failed; known at the end."""
        self.frozen = False
        self.stop = False
        self.control: torch.distributed.ProcessGroup | None = None
        self.claim: claims.Claim | None = None

    def go(self) -> bool:
        """Make every run that nobody else makes; process groups exist.

        Returns:
            False where a run was asked to stop early: the same command goes on from there.

        Raises:
            ConfigError: a finished run was made with other settings.
            RanksApart: after a failure of some ranks alone; its record is written.
        """
        with self._control_group(), self._stop_signals():
            try:
                while True:
                    word, run = self._tell(self._next() if distributed.rank() == 0 else None)
                    if word == "stop":
                        return False
                    if word == "end":
                        self.failed = self._tell(self.records.failed())
                        return True
                    if run is None:
                        time.sleep(WAIT_SECONDS)
                    elif not self._make(run):
                        return False
            except StopAsked:
                return False
            finally:
                self._release()

    def _next(self) -> tuple[str, Run | None]:
        """Claim a run: "make" and the run, or else "wait" (for other processes' sweeps), "end" or "stop"."""
        if self.stop:
            return "stop", None
        pending, waiting = self.records.left()
        for run in pending:
            directory = self.plan.directory(run)
            self.claim = claims.take(directory)
            if self.claim is None:
                continue
            if self.records.look(run) is None:
                begin(directory, self.plan.identity(run), anew=read_record(directory) is not None)
                return "make", run
            self._release()  # it ended between the two looks
        return ("wait", None) if waiting else ("end", None)

    def _make(self, run: Run) -> bool:
        """False where it stopped early."""
        started = time.time()
        record: dict[str, Any] | None = None
        error: str | None = None
        stopped = False
        try:
            record = execute(self.plan, run)
        except Stopped:
            stopped = True
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
            directory = self.plan.directory(run)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"error-rank{distributed.rank()}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        errors = self._gather(error)
        bad = [text for text in errors if text is not None]
        if any(self._gather(stopped)):
            return False
        if distributed.rank() == 0:
            if bad:
                failure = describe(self.plan, run, status="failed", started=started)
                record = {**failure, "seconds": round(time.time() - started, 3), "error": bad[0]}
            assert record is not None and self.claim is not None
            self._end(run, record)
        if bad and len(bad) < len(errors):
            raise RanksApart(
                f"{run} failed on {len(bad)} of {len(errors)} ranks ({bad[0]}); it is recorded as failed. Start the "
                "same command again to go on with the other runs"
            )
        self._release()
        if not self.frozen:
            self._freeze()
        return True

    def _release(self) -> None:
        if self.claim is not None:
            self.claim.release()
            self.claim = None

    def _freeze(self) -> None:
        """Take what the libraries hold out of the garbage collector's sight, which looks through everything before each
        run: a third of the time of a run of seconds."""
        start_ranks()  # leaves the layout of the first run, which is not to be kept
        gc.freeze()
        self.frozen = True

    def _end(self, run: Run, record: dict[str, Any]) -> None:
        assert self.claim is not None
        if not self.claim.is_ours():
            print(f"> {run}: another process took it over while this one was suspended", flush=True)
            return
        directory = self.plan.directory(run)
        write_json(directory / NAME, record)
        if record["status"] == "finished":
            self.seconds.append(record["seconds"])
            clean(directory, self.plan.suite.keep)
        self._report(run, record)

    def _report(self, run: Run, record: dict[str, Any]) -> None:
        pending, waiting = self.records.left()
        left = len(pending) + waiting
        at_work = sum(claims.is_claimed(self.plan.directory(other)) for other in pending if other != run)
        what = f"failed: {record.get('error')}"
        if record["status"] == "finished":
            what = ", ".join([*_told(record["measured"]), f"{record['seconds']:.1f} s"])
        line = f"> {run}: {what}; {left} left"
        if left and self.seconds:
            rest = sum(self.seconds) / len(self.seconds) * left / (1 + at_work)
            line += f", about {datetime.timedelta(seconds=round(rest))}"
        print(line, flush=True)

    @contextmanager
    def _control_group(self) -> Iterator[None]:
        """A group of its own for who makes what: rank 0 may wait long for other processes."""
        if distributed.world_size() > 1:
            self.control = torch.distributed.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        try:
            yield
        finally:
            gc.unfreeze()
            if self.control is not None:
                distributed.close_groups([self.control])
                self.control = None

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """One rank stops at once, several after the run; with checkpoints training itself stops after a step."""

        def note(number: int, frame: FrameType | None) -> None:
            self.stop = True
            if distributed.world_size() == 1:
                raise StopAsked

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _tell(self, value: Any) -> Any:
        if self.control is None:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def _gather(self, value: Any) -> list[Any]:
        if self.control is None:
            return [value]
        values: list[Any] = [None] * distributed.world_size()
        torch.distributed.all_gather_object(values, value, group=self.control)
        return values


def _told(measured: dict[str, Any]) -> Iterator[str]:
    for name, values in measured.items():
        for measure, title in (("kl_forward", "KL"), (ACCURACY, "accuracy")):
            if values.get(measure) is not None:
                yield f"{name} {title} {values[measure]:.4f}"


def start_ranks() -> None:
    """The process group that all runs share; each lays out its own groups within."""
    distributed.initialize(ParallelConfig(), seed=0)


def clean(directory: Path, keep: str) -> None:
    """Delete what only an unfinished run needs."""
    if keep != "all":
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
