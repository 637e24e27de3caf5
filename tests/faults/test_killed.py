"""Whatever ends the ranks of a run: the next start goes on, and the weights are those of an undisturbed run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megatron_taopd.checkpoint import read_latest_iteration
from megatron_taopd.commands.common import ranks
from megatron_taopd.platform import distributed
from megatron_taopd.training.hooks.base import Hook
from megatron_taopd.training.watchdog import Watchdog
from tests.faults.ranks import Job
from tests.faults.runs import ITERATIONS, assert_same, lines, make_inputs, words


def leave_watched(words: Sequence[str]) -> None:
    """End at once, and leave a process behind that is watched with this one as the parent to end with, or without."""
    survived, parent = Path(words[0]), os.getpid() if words[1] == "with parent" else None
    if os.fork() == 0:
        with Watchdog(10.0, parent=parent):
            time.sleep(2)
        survived.touch()
    os._exit(0)


def test_only_a_process_that_is_to_end_with_its_parent_does(tmp_path: Path) -> None:
    cases = ("with parent", "without")
    jobs = [
        Job(tmp_path / name, [str(tmp_path / name / "survived"), name], ranks=1, run=leave_watched) for name in cases
    ]
    assert [job.wait() for job in jobs] == [[0], [0]]
    deadline = time.monotonic() + 30
    while not (tmp_path / "without" / "survived").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "the process that started it is gone" in jobs[0].output()
    assert not (tmp_path / "with parent" / "survived").exists()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    make_inputs(root)
    return root


@pytest.fixture(scope="module")
def straight(root: Path) -> Path:
    """The undisturbed run."""
    out = root / "straight"
    job = Job(out / "logs", words(root, out))
    assert job.wait() == [0, 0], job.output()
    assert len(lines(out)) == ITERATIONS
    kept = sorted(path.name for path in (out / "checkpoints").glob("iter_*"))
    assert kept == ["iter_0000004", "iter_0000005"]
    return out


class StuckHook(Hook):
    """Holds rank 1 up after the second step."""

    def on_step(self, trainer: object, metrics: dict[str, float]) -> None:
        if distributed.rank() == 1 and metrics["iteration"] == 2:
            while True:
                time.sleep(0.1)


def train_and_get_stuck(arguments: Sequence[str]) -> None:
    from megatron_taopd.cli import parse
    from megatron_taopd.commands.train import run_training
    from megatron_taopd.config import TrainConfig

    config = parse(TrainConfig, arguments[1:], name="train")
    with ranks(config.parallel, seed=config.seed):
        run_training(config, further_hooks=[StuckHook()])


@pytest.fixture(scope="module", autouse=True)
def hanging(root: Path) -> dict[str, Job]:
    """A run of which a rank is stopped, and one of which a rank is stuck; the other tests pass meanwhile."""
    limit = "--distributed-timeout-minutes=0.5"
    jobs = {
        "silent": Job(root / "silent" / "logs", words(root, root / "silent", limit)),
        "stuck": Job(root / "stuck" / "logs", words(root, root / "stuck", limit), run=train_and_get_stuck),
    }
    jobs["silent"].until(lambda: len(lines(root / "silent")) >= 2)
    jobs["silent"].send(1, signal.SIGSTOP)
    return jobs


def finish(root: Path, out: Path, *further: str) -> None:
    job = Job(out / "logs_again", words(root, out, *further))
    assert job.wait() == [0, 0], job.output()


Moment = Callable[[Path], object]
MOMENTS: dict[str, tuple[Moment, tuple[int, ...], tuple[str, ...]]] = {
    "while a checkpoint is written": (lambda out: list(out.glob("checkpoints/.iter_0000003.partial-*")), (1,), ()),
    "while one is written beside": (
        lambda out: list(out.glob("checkpoints/.iter_0000004.partial-*/*.distcp")),
        (0, 1),
        ("--async-save",),
    ),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_killed(root: Path, straight: Path, tmp_path: Path, name: str) -> None:
    moment, victims, further = MOMENTS[name]
    job = Job(tmp_path / "logs", words(root, tmp_path, *further))
    job.until(lambda: moment(tmp_path))
    job.kill(*victims)
    job.kill()  # as torchrun does
    assert 0 < (read_latest_iteration(tmp_path / "checkpoints") or 0) < ITERATIONS
    finish(root, tmp_path, *further)
    assert_same(tmp_path, straight)


def test_a_signal_to_one_rank_stops_all_of_them_with_a_checkpoint(root: Path, tmp_path: Path) -> None:
    seldom = ("--save-interval=100",)
    job = Job(tmp_path / "logs", words(root, tmp_path, *seldom))
    job.until(lambda: len(lines(tmp_path)) >= 2)
    job.send(1, signal.SIGTERM)
    assert job.wait() == [75, 75]
    done = len(lines(tmp_path))
    assert read_latest_iteration(tmp_path / "checkpoints") == done
    assert f"stopping after iteration {done} of {ITERATIONS}: SIGTERM was received" in job.output()


def test_a_rank_that_hangs_is_named_and_the_run_ends(root: Path, straight: Path, hanging: dict[str, Job]) -> None:
    silent, stuck = hanging["silent"], hanging["stuck"]
    silent.processes[0].join(60)
    silent.kill(1)
    assert silent.wait() == [124, -signal.SIGKILL], silent.output()
    assert "No sign of life from rank 1" in silent.logs[0].read_text()
    assert stuck.wait() == [124, 124], stuck.output()
    text = stuck.logs[0].read_text()
    assert "The others wait for rank 1." in text
    assert "rank 1: iteration 2, StuckHook: is busy in training/loop.py:" in text
    assert "rank 0: iteration 2, between steps: waits for others in training/stopping.py:" in text
    assert "time.sleep(0.1)" in stuck.logs[1].read_text()  # where it is
    finish(root, root / "silent")
    assert_same(root / "silent", straight)
