"""``python -m megatron_taopd.torchrun``: signals reach the ranks, and their exit status the launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_taopd.torchrun import exit_status

STOPS_WHEN_ASKED = """
trap 'echo usr1 >> {dir}/signals' USR1
trap 'echo term >> {dir}/signals; exit 75' TERM
echo >> {dir}/ready
while true; do sleep 0.05; done
"""


def start(script: str) -> subprocess.Popen:
    words = ["--nproc-per-node=2", "--no-python", "bash", "-c", script]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_taopd.torchrun", *words],
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )


def wait_for_lines(path: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


def test_signals_reach_the_ranks_and_their_status_the_launcher(tmp_path: Path) -> None:
    stops = start(STOPS_WHEN_ASKED.format(dir=tmp_path))
    fails = start('test "$RANK" = 0 && sleep 60; exit 2')
    wait_for_lines(tmp_path / "ready", 2, stops)
    for number, name in ((signal.SIGUSR1, "usr1"), (signal.SIGTERM, "term")):
        stops.send_signal(number)
        if name == "usr1":
            wait_for_lines(tmp_path / "signals", 2, stops)
    _, errors = stops.communicate(timeout=60)
    assert stops.returncode == 75, errors
    assert "the ranks stopped as asked; run again (exit status 75)" in errors
    assert sorted((tmp_path / "signals").read_text().split())[-2:] == ["usr1", "usr1"]
    _, errors = fails.communicate(timeout=60)
    assert fails.returncode == 2, errors
    assert "rank 1 ended with exit code 2" in errors


@pytest.mark.parametrize(
    ("codes", "asked_to_stop", "status"),
    [
        ([75, 75], False, 75),
        ([75, -15], True, 75),  # one rank was still starting
        ([-10], True, 75),
        ([-15], False, 143),  # somebody else ended it
        ([-9, 1], True, 137),
        ([124, -15], False, 124),
        ([1, 75], True, 1),
    ],
)
def test_exit_status(codes: list[int], asked_to_stop: bool, status: int) -> None:
    assert exit_status(codes, asked_to_stop=asked_to_stop) == status
