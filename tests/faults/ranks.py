"""Ranks as torchrun would start them, but forked from a process that has imported everything: they start at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_taopd import cli
from megatron_taopd.testing.pool import PRELOAD


class Job:
    """Ranks that run a command, each with a log file."""

    def __init__(self, logs: Path, words: Sequence[str], *, ranks: int = 2, run: Callable[..., Any] = cli.main) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOAD])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.logs = [logs / f"rank_{rank}.log" for rank in range(ranks)]
        self.processes = [
            context.Process(target=_rank, args=(run, list(words), rank, ranks, port, self.logs[rank]))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit statuses, negative for signals; ranks that are still there then are killed, and it is an error."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        assert not late, f"ranks {late} did not end:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def kill(self, *ranks: int) -> None:
        """SIGKILL, all ranks by default."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].kill()
            self.processes[rank].join()

    def send(self, rank: int, number: signal.Signals) -> None:
        """A signal to one rank."""
        os.kill(self.processes[rank].pid, number)

    def until(self, condition: Callable[[], Any], timeout: float = 120.0) -> None:
        """Wait for something to happen while the ranks run."""
        deadline = time.monotonic() + timeout
        while not condition():
            alive = all(process.is_alive() for process in self.processes)
            assert alive and time.monotonic() < deadline, self.output()
            time.sleep(0.002)

    def output(self) -> str:
        """All logs."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())


def _rank(run: Callable[..., Any], words: list[str], rank: int, ranks: int, port: int, log: Path) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    torch.set_num_threads(1)
    sys.exit(run(words))
