"""The gloo pool: results in rank order, state that stays, and failures that name the rank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch

from megatron_taopd.testing import WorkerError, WorkerPool, run_distributed


def summed_rank(offset: int, *, factor: int = 1) -> tuple[int, float, str]:
    rank = torch.distributed.get_rank()
    total = torch.tensor(float((rank + offset) * factor))
    torch.distributed.all_reduce(total)
    return rank, float(total), os.environ["LOCAL_RANK"]


def process_id() -> int:
    return os.getpid()


def fail_on(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        raise KeyError("the missing thing")
    torch.distributed.barrier()


def exit_on(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        os._exit(7)
    torch.distributed.barrier()


def test_results_come_in_rank_order(pool: Callable[[int], WorkerPool]) -> None:
    assert pool(2).run(summed_rank, 10, factor=2) == [(0, 42.0, "0"), (1, 42.0, "1")]


def test_processes_stay_between_calls(pool: Callable[[int], WorkerPool]) -> None:
    first = pool(2).run(process_id)
    assert first == pool(2).run(process_id)
    assert len({os.getpid(), *first}) == 3


def test_failure_names_the_rank_and_the_pool_recovers() -> None:
    with WorkerPool(2) as own:
        with pytest.raises(WorkerError, match=r"(?s)fail_on on 2 ranks failed on rank 1.*the missing thing"):
            own.run(fail_on, 1)
        assert [rank for rank, *_ in own.run(summed_rank, 0)] == [0, 1]
        with pytest.raises(
            WorkerError, match=r"rank 0 died during exit_on on 2 ranks \(exit code 7\)|failed on rank 1"
        ):
            own.run(exit_on, 0)


def test_timeout_names_the_silent_ranks() -> None:
    with WorkerPool(1) as own:
        own.run(process_id)
        own.timeout = 0.2
        with pytest.raises(TimeoutError, match=r"sleep.*took longer than 0.2 s; no answer from ranks \[0\]"):
            own.run(time.sleep, 30)


def test_one_shot() -> None:
    assert run_distributed(summed_rank, 1, 5) == [(0, 5.0, "0")]
