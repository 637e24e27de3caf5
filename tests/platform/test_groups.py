"""Laying the ranks out anew closes the groups of the last layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig

TASKS = Path("/proc/self/task")


def threads_after_each_layout() -> list[int]:
    counts = []
    for tensor_parallel in (2, 1, 2, 1):
        distributed.initialize(ParallelConfig(tensor_model_parallel_size=tensor_parallel), seed=1)
        distributed.shutdown()
        counts.append(len(list(TASKS.iterdir())))
    return counts


@pytest.mark.skipif(not TASKS.exists(), reason="counts threads in /proc")
def test_no_thread_outlives_a_layout(pool) -> None:
    """gloo keeps a thread a group; a process that changes layouts must not gather them."""
    for counts in pool(2).run(threads_after_each_layout):
        assert counts[-1] <= counts[0], counts
