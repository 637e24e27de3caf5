"""Early ends on request, and what is only told: in the ranks of the session, without new processes."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_taopd import cli
from megatron_taopd.checkpoint import read_latest_iteration
from megatron_taopd.checkpoint_config import CheckpointConfig
from megatron_taopd.commands.train import run_training
from megatron_taopd.config import TrainConfig
from megatron_taopd.errors import ConfigError, DataError
from megatron_taopd.platform import distributed
from megatron_taopd.testing import WorkerPool
from megatron_taopd.training.hooks.base import Hook
from megatron_taopd.training.resume import changed_flags
from tests.faults.runs import ITERATIONS, assert_same, lines, make_inputs, words

Pools = Callable[[int], WorkerPool]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    make_inputs(root)
    return root


def run_with(arguments: Sequence[str], hook: Hook) -> bool:
    """``taopd train`` with one more hook."""
    config = cli.parse(TrainConfig, arguments[1:], name="train")
    distributed.initialize(config.parallel, seed=config.seed)
    return run_training(config, further_hooks=[hook])


class SignalHook(Hook):
    """Sends this process a signal after a step, on one rank."""

    def on_step(self, trainer: Any, metrics: dict[str, float]) -> None:
        if distributed.rank() == 1 and metrics["iteration"] == 3:
            os.kill(os.getpid(), signal.SIGUSR1)


def _stop_again_and_again(root: Path, out: Path) -> list[Any]:
    seldom = ("--save-interval=100",)
    cli.run(words(root, out / "straight", *seldom))
    stopped = words(root, out / "stopped", *seldom)
    answers: list[Any] = [cli.run([*stopped, "--exit-interval=2"])]
    answers.append(run_with(stopped, SignalHook()))
    answers.append(signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL)
    answers.append(cli.run([*stopped, "--exit-duration-in-mins=1e-6"]))
    answers.append(read_latest_iteration(out / "stopped" / "checkpoints"))
    answers.append(cli.run(stopped))
    return answers


def test_a_run_that_is_stopped_in_every_way_ends_like_one_that_was_not(pool: Pools, root: Path, tmp_path: Path) -> None:
    for answers in pool(2).run(_stop_again_and_again, root, tmp_path):
        assert answers == [75, False, True, 75, 4, 0]
    assert len(lines(tmp_path / "stopped")) == ITERATIONS
    assert_same(tmp_path / "stopped", tmp_path / "straight")


def _spoil_the_data(root: Path, out: Path) -> list[Any]:
    prompts = (root / "prompts.jsonl").read_text()
    own = out / "prompts.jsonl"
    arguments = [*words(root, out), f"--prompt-data={own}"]
    answers: list[Any] = []
    for text, further in (
        (prompts, ["--exit-interval=2"]),
        (prompts + '{"id": "torn", "prompt_tok\n', []),
        (prompts.replace("40", "41"), ["--exit-interval=3"]),
        (prompts, []),
    ):
        torch.distributed.barrier()
        own.write_text(text)
        torch.distributed.barrier()
        try:
            answers.append(cli.run([*arguments, *further]))
        except DataError as error:
            answers.append(str(error))
    return answers


def test_data_that_is_spoiled_or_exchanged_between_two_starts(pool: Pools, root: Path, tmp_path: Path) -> None:
    for answers in pool(2).run(_spoil_the_data, root, tmp_path):
        assert f"{tmp_path}/prompts.jsonl:11: not valid JSON" in answers.pop(1)
        assert answers == [75, 75, 0]
    warned = [json.loads(line)["message"] for line in (tmp_path / "warnings.jsonl").read_text().splitlines()]
    assert len(warned) == 2  # other data, and the first again
    for message in warned:
        assert message.startswith("the data is not that of the checkpoint (10 samples, ")
    assert [line["iteration"] for line in lines(tmp_path)] == list(range(1, ITERATIONS + 1))


def test_flags_that_differ_from_those_of_the_checkpoint() -> None:
    before = {"lr": 1e-3, "save": "a", "teacher": ["x"], "seed": 1, "gone": 3}
    assert changed_flags(before, {"lr": 2e-3, "save": "b", "teacher": ["x"], "seed": 1, "new": 4}) == [
        "lr 0.001 -> 0.002"
    ]


class FullDiskHook(Hook):
    """Rank 0 cannot write any more from one step to another."""

    def on_step(self, trainer: Any, metrics: dict[str, float]) -> None:
        if distributed.rank() == 0 and metrics["iteration"] in (2, 4):
            size = 100 if metrics["iteration"] == 2 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _fill_the_disk(root: Path, out: Path) -> tuple[bool, list[str]]:
    arguments = [word for word in words(root, out) if not word.startswith(("--save", "--load", "--keep-last"))]
    further = [f"--tensorboard-dir={out / 'tensorboard'}", "--dump-kept-interval=1"]
    try:
        return run_with([*arguments, *further], FullDiskHook()), []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_full_disk_under_the_metrics_ends_no_run(pool: Pools, root: Path, tmp_path: Path) -> None:
    assert [answer[0] for answer in pool(2).run(_fill_the_disk, root, tmp_path)] == [True, True]
    assert [line["iteration"] for line in lines(tmp_path)] == list(range(1, ITERATIONS + 1))
    dumped = sorted(path.name for path in (tmp_path / "kept_tokens").glob("*.jsonl"))
    assert dumped == [f"iter_{iteration:07d}.jsonl" for iteration in (1, 2, 5)]


def _start_where_nothing_can_be_written(root: Path, out: Path) -> list[str]:
    messages = []
    for flag in ("--save", "--log-dir"):
        try:
            cli.run([*words(root, out), f"{flag}={out / 'file' / 'below'}"])
        except ConfigError as error:
            messages.append(str(error))
    return messages


def test_a_directory_that_cannot_be_written_is_refused_before_any_work(pool: Pools, root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = pool(2).run(_start_where_nothing_can_be_written, root, tmp_path)
    assert first == second
    for flag, message in zip(("--save", "--log-dir"), first, strict=True):
        assert (
            message.startswith(f"{flag} {tmp_path}/file/below cannot be written (rank 0): ") and "name ano" in message
        )
    assert not list(tmp_path.rglob("*.*"))


def test_refused_settings() -> None:
    for options, message in (
        ({"exit_interval": 2}, "--exit-interval 2 has no effect without --save"),
        ({"keep_last_checkpoints": 2}, "--keep-last-checkpoints 2 has no effect without --save"),
        ({"exit_duration_in_mins": 5.0}, "--exit-duration-in-mins 5.0 has no effect without --save"),
        ({"save": "x", "keep_last_checkpoints": 0}, "--keep-last-checkpoints 0 must be at least 1"),
        ({"save": "x", "exit_duration_in_mins": 0.0}, "must be positive"),
        ({"save": "x", "async_save": True}, "--async-save has no effect without --save-interval"),
    ):
        with pytest.raises(ConfigError, match=message):
            CheckpointConfig(**options)  # type: ignore[arg-type]
