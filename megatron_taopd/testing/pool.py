"""Persistent gloo ranks on this machine: start them once, then run function after function on them."""

from __future__ import annotations

import atexit
import datetime
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

PRELOAD = "megatron_taopd.testing.preload"
"""Module that the process which ranks are forked from imports."""

_START_TIMEOUT = 300.0
_CLOSE_TIMEOUT = 5.0


class WorkerError(RuntimeError):
    """A function failed on a rank; the message carries the rank and its traceback."""


class WorkerPool:
    """``world_size`` processes with a gloo process group between them, as ``torchrun`` would set them up.

    The processes start with the first :meth:`run` and stay; without a GPU they are forked from one that has imported
    this package and what it stands on, with the environment of the first pool's start. A call that fails on any rank,
    or takes longer than ``timeout`` seconds, ends them all (the others may wait in a collective) and the next call
    starts fresh ones.
    """

    def __init__(self, world_size: int, timeout: float = 300.0) -> None:
        if world_size < 1:
            raise ValueError(f"world_size {world_size} must be at least 1")
        self.world_size = world_size
        self.timeout = timeout
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._store: Any = None

    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call ``fn(*args, **kwargs)`` on every rank.

        Args:
            fn: a function at the top level of an importable module; the ranks import it by name.
            args: positional arguments, pickled.
            kwargs: keyword arguments, pickled.

        Returns:
            What each rank returned, in rank order.

        Raises:
            WorkerError: the function failed on a rank.
            TimeoutError: it did not return on every rank in time.
        """
        payload = pickle.dumps((fn, args, kwargs))
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(payload)
        name = getattr(fn, "__qualname__", repr(fn))
        return self._collect(self.timeout, f"{name} on {self.world_size} ranks")

    def close(self) -> None:
        """End the processes. The pool may be used again afterwards."""
        for pipe in self._pipes:
            try:
                pipe.send_bytes(b"")
            except OSError:
                pass
        for process in self._processes:
            process.join(_CLOSE_TIMEOUT)
        self._kill()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start(self) -> None:
        import torch

        atexit.register(self._kill)  # the interpreter would wait for the ranks of a pool left open
        # CUDA cannot be used in a fork of a process that has seen it.
        context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        context.set_forkserver_preload([PRELOAD])
        # The store lives here, on a port that it took itself: no other pool can have taken it in between.
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = _free_port()
        # torch reads this when it is imported, before any code of ours could set it.
        previous = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                arguments = (theirs, rank, self.world_size, self._store.port, port, self.timeout)
                process = context.Process(target=_serve, args=arguments)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
        finally:
            if previous is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = previous
        self._collect(_START_TIMEOUT, f"the start of {self.world_size} ranks")

    def _collect(self, timeout: float, what: str) -> list[Any]:
        """One answer from every rank, or the first failure."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(answers) < self.world_size:
                open_pipes = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
                ready = multiprocessing.connection.wait(open_pipes, max(0.0, deadline - time.monotonic()))
                if not ready:
                    missing = [rank for rank in range(self.world_size) if rank not in answers]
                    raise TimeoutError(f"{what} took longer than {timeout:g} s; no answer from ranks {missing}")
                for pipe in ready:
                    rank = self._pipes.index(pipe)
                    ok, value = self._receive(rank, what)
                    if not ok:
                        raise WorkerError(f"{what} failed on rank {rank}:\n{value}")
                    answers[rank] = value
        except BaseException:
            self._kill()
            raise
        return [answers[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int, what: str) -> tuple[bool, Any]:
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, ConnectionError):
            self._processes[rank].join(_CLOSE_TIMEOUT)
            code = self._processes[rank].exitcode
            raise WorkerError(f"rank {rank} died during {what} (exit code {code})") from None

    def _kill(self) -> None:
        atexit.unregister(self._kill)
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(_CLOSE_TIMEOUT)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, **kwargs: Any) -> list[Any]:
    """Run ``fn(*args, **kwargs)`` once on ``world_size`` fresh gloo ranks; see :meth:`WorkerPool.run`."""
    with WorkerPool(world_size) as pool:
        return pool.run(fn, *args, **kwargs)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(pipe: Any, rank: int, world_size: int, store_port: int, port: int, timeout: float) -> None:
    """Body of a rank: set up the process group, then answer calls until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the caller, which ends the ranks
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    try:
        limit = datetime.timedelta(seconds=timeout)
        store = torch.distributed.TCPStore("127.0.0.1", store_port, is_master=False, timeout=limit)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        pipe.send_bytes(pickle.dumps((True, None)))
        while payload := pipe.recv_bytes():
            pipe.send_bytes(_answer(payload))
    except (EOFError, OSError):
        pass  # the caller is gone
    except Exception:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a peer may be gone already, and taking groups down in order would wait for it


def _end_with_parent(parent: int) -> None:
    """A rank that waits in a collective would outlive a caller that was killed; what it is forked from does not."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _answer(payload: bytes) -> bytes:
    try:
        fn, args, kwargs = pickle.loads(payload)
        return pickle.dumps((True, fn(*args, **kwargs)))
    except Exception:
        return pickle.dumps((False, traceback.format_exc()))
