"""The files of this rank's tensors: megatron-core plans them, this module writes them, here or in the background.

megatron-core's own writers start a manager process that a job's SIGTERM kills, and leave ranks waiting when rank 0
meets a full disk. Its plan, file format and index are used; what goes wrong is kept for all ranks to hear of.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import multiprocessing
import os
import queue
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_taopd.files import sha256_of_file

Bucket = tuple[str, str, Any]
"""Path and name of a file, and what goes into it."""


@dataclass(kw_only=True)
class Written:
    """What this rank has written."""

    results: dict[int, Any] = field(default_factory=dict)
    """Of each bucket, for the index."""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file."""
    error: str | None = None

    def joined(self, small: Written) -> Written:
        """With other files beside those of the buckets."""
        return replace(self, digests={**self.digests, **small.digests})


@dataclass(kw_only=True)
class Plan:
    """What this rank will write of a state, and the index that rank 0 writes at the end."""

    buckets: list[Bucket]
    transforms: list[Any]
    finish_index: Callable[[Written], str | None]
    """Collective; answers rank 0's error."""
    error: str | None
    """Of the files that rank 0 writes ahead."""


def plan(state: dict[str, Any], directory: Path, metadata: dict[str, Any]) -> Plan:
    """Let megatron-core plan a sharded state; tensors on a device are copied to host memory. Collective."""
    # Its queue would live in a process of its own; this one is only ever asked whether it is there.
    module: Any = filesystem_async
    module._results_queue = module._results_queue or queue.Queue()
    strategy = _PlanOnly("torch_dist", 1, thread_count=2)
    options = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        options["async_strategy"] = "mcore"
    with _common_state() as errors:
        request = dist_checkpointing.save(
            state, str(directory), strategy, async_sharded_save=True, content_metadata=metadata, **options
        )
    assert request is not None and strategy.writer is not None
    buckets = request.preload_fn() if request.preload_fn is not None else []
    return Plan(
        buckets=buckets,
        transforms=[strategy.writer.transforms] if hasattr(strategy.writer, "transforms") else [],
        finish_index=partial(_finish_index, strategy, request.finalize_fns[0]),
        error=errors[0] if errors else None,
    )


def _finish_index(strategy: _PlanOnly, finalize: Callable[[], None], written: Written) -> str | None:
    assert strategy.writer is not None
    if strategy.writer.results_queue is not None:
        strategy.writer.results_queue = queue.Queue()
        strategy.writer.results_queue.put(written.results)
    finalize()
    return strategy.error


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Keeps megatron-core's writer at hand; an index that rank 0 cannot write does not leave the others waiting."""

    writer: Any = None
    error: str | None = None

    def _get_save_and_finalize_callbacks(self, writer: Any, *planned: Any) -> Any:
        self.writer, write_index = writer, writer.finish

        def finish(*arguments: Any) -> None:
            try:
                write_index(*arguments)
            except Exception as error:
                self.error = reason(error)

        writer.finish = finish
        return super()._get_save_and_finalize_callbacks(writer, *planned)


@contextlib.contextmanager
def _common_state() -> Iterator[list[str]]:
    """Where rank 0 writes ``common.pt`` (megatron-core 0.16), a full disk is no reason for the others to wait."""
    errors: list[str] = []

    def save_common(self: Any, common_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        if dist.get_rank() == 0:
            try:
                write_saved(common_state_dict, Path(checkpoint_dir) / common.COMMON_STATE_FNAME)
            except OSError as error:
                errors.append(reason(error))

    strategy = getattr(common, "TorchCommonSaveStrategy", None)  # 0.19 keeps the common state in the shards
    if strategy is None:
        yield errors
        return
    plain = strategy.save_common
    strategy.save_common = save_common
    try:
        yield errors
    finally:
        strategy.save_common = plain


def write_saved(value: Any, path: Path) -> None:
    """``torch.save`` of something small, with the system's own error where the disk is full."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with open(path, "wb") as stream:
        stream.write(buffer.getbuffer())
        stream.flush()
        os.fsync(stream.fileno())


def write(buckets: Sequence[Bucket], transforms: list[Any]) -> Written:
    """Write and read back this rank's files, side by side."""
    written = Written()
    if not buckets:
        return written
    with ThreadPoolExecutor(len(buckets)) as threads:
        parts = list(threads.map(partial(_write_bucket, transforms), range(len(buckets)), buckets))
    for index, (result, digest) in enumerate(parts):
        if isinstance(result, Exception):
            written.error = written.error or reason(result)
        else:
            written.results[index] = result
            written.digests[buckets[index][1]] = digest
    return written


def _write_bucket(transforms: list[Any], index: int, bucket: Bucket) -> tuple[Any, str]:
    results: queue.Queue[Any] = queue.Queue()
    running: queue.Queue[int] = queue.Queue()
    running.put(index)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, index, bucket, results, running, use_fsync=True
    )
    _, result = results.get()
    if isinstance(result, Exception):
        return result, ""
    try:
        return result, sha256_of_file(Path(bucket[0]))
    except OSError as error:
        return error, ""


def reason(error: BaseException) -> str:
    """The system's error inside one of torch's, which tells of stream positions when a disk is full."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError):
            return str(found)
        found = found.__cause__ or found.__context__
    return f"{type(error).__name__}: {error}"


class WriterProcess:
    """Writes in a forked process: what it writes is the memory as it was at the fork, so that training goes on."""

    def __init__(self, buckets: Sequence[Bucket], transforms: list[Any]) -> None:
        context = multiprocessing.get_context("fork")
        self._answer, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_write_and_tell, args=(theirs, buckets, transforms))
        enabled = gc.isenabled()
        gc.disable()  # collecting device tensors in the child would call CUDA there
        # A job's signals reach every process of it, and the checkpoint is to be finished: the child never sees them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 of forks beside threads
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if enabled:
                gc.enable()
        theirs.close()

    def done(self) -> bool:
        """Whether this rank's files are written, or never will be."""
        return self._answer.poll() or not self._process.is_alive()

    def wait(self) -> Written:
        """What was written."""
        try:
            written = self._answer.recv()
        except EOFError:
            written = None
        self._process.join()
        self._answer.close()
        if written is None:
            return Written(error=f"its writer process died (exit code {self._process.exitcode})")
        return written


def _write_and_tell(answer: Any, buckets: Sequence[Bucket], transforms: list[Any]) -> None:
    gc.disable()
    torch.set_num_threads(1)  # a forked child must not wait for the parent's threads
    answer.send(write(buckets, transforms))
    answer.close()
