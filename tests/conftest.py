"""Shared by all tests: gloo ranks that start once a session, and one thread a process."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_taopd.testing import WorkerPool

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """What tests import is there for good: the collector need not look through it at every change of layout."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_importable() -> Iterator[None]:
    """Ranks and command lines that tests start find this checkout; one thread suits small tensors."""
    torch.set_num_threads(1)
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.syspath_prepend(str(ROOT))
        yield


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that a test or fixture runs in this process configures the package's log; other tests listen to it."""
    log = logging.getLogger("megatron_taopd")
    log.handlers[:], log.level, log.propagate = [], logging.NOTSET, True
    yield
    log.handlers[:], log.level, log.propagate = [], logging.NOTSET, True


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], WorkerPool]]:
    """``pool(n)`` gives the session's ``n`` gloo ranks; each size starts once."""
    pools: dict[int, WorkerPool] = {}

    def get(world_size: int) -> WorkerPool:
        if world_size not in pools:
            pools[world_size] = WorkerPool(world_size)
        return pools[world_size]

    yield get
    for open_pool in pools.values():
        open_pool.close()
