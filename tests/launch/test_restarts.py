"""``--max-restarts``: torchrun starts ranks anew where one has died; the weights are those of an undisturbed run."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_taopd.checkpoint import read_latest_iteration
from tests.faults.runs import ITERATIONS, assert_same, lines, make_inputs, words
from tests.launch import runs


@pytest.mark.slow
def test_a_killed_rank_is_replaced_within_the_job(pool, tmp_path: Path) -> None:
    make_inputs(tmp_path)
    out, straight = tmp_path / "out", tmp_path / "straight"
    own = ("--nproc-per-node", "2", "--max-restarts", "1")
    launch = [sys.executable, "-m", "megatron_taopd", "launch", "local", *own, "--", *words(tmp_path, out)]
    with subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        try:
            pool(2).run(runs.run, words(tmp_path, straight))
            deadline = time.monotonic() + 120
            while (read_latest_iteration(out / "checkpoints") or 0) < 2:
                assert time.monotonic() < deadline and launcher.poll() is None
                time.sleep(0.002)
            ranks = psutil.Process(launcher.pid).children()
            (victim,) = [rank for rank in ranks if rank.environ().get("RANK") == "1"]
            victim.kill()
            said, _ = launcher.communicate(timeout=300)
        finally:
            left = psutil.Process(launcher.pid).children() if launcher.poll() is None else []
            launcher.kill()
            for rank in left:
                rank.kill()
    assert launcher.returncode == 0, said
    resumed = [int(number) for number in re.findall(r"resumed from iteration (\d+)", said)]
    assert len(resumed) == 1 and 2 <= resumed[0] < ITERATIONS, said
    assert len(lines(out)) == ITERATIONS
    assert_same(out, straight)
