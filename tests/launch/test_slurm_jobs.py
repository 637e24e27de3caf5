"""The batch script on a real SLURM: what it does when it is told to stop, pre-empted, cancelled, or fails.

The ranks are stand-ins; a real training run is in test_slurm_training.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_taopd import cli
from tests.launch.cluster import Cluster, Job

STAND_IN = Path(__file__).with_name("stand_in.sh")


Submit = Callable[..., Job]


@pytest.fixture
def submit(
    slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Submit:
    """``taopd launch slurm`` with a stand-in for the ranks."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def submit(mode: str, *flags: str, save: str = "my checkpoints", nodes: int = 2) -> Job:
        command = [
            *("train", "--student", "s", "--teacher", "t", "--prompt-data", "my prompts.jsonl"),
            *("--save", save, "--load", save, "--log-dir", "100% of it"),
        ]
        own = [
            *("--nodes", str(nodes), "--nproc-per-node", "1", "--gpus-per-node", "0", "--python", str(STAND_IN)),
            *("--env", f"MODE={mode}", "--env", f"SAVE={save}", *flags),
        ]
        assert cli.run(["launch", "slurm", *own, "--", *command]) == 0
        job = capsys.readouterr().out.split()[-1]
        return Job(slurm, job, tmp_path / "100% of it/slurm")

    return submit


def test_told_to_stop_it_queues_again_and_finishes(submit: Submit) -> None:
    job = submit("wait")
    job.wait_for_ranks()
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.id)  # as SLURM does before the time limit
    job.start_again_now()
    job.wait_for_state("COMPLETED")
    assert "told to stop: time is nearly up" in job.log()
    assert "stopped at iteration 7; queued again" in job.log()
    assert job.ranks(0).count("asked to stop: USR1") >= 2
    assert "start 1 of node 0" in job.ranks(1)
    assert "ended with status 0" in job.log()
    assert "-- train --student s --teacher t --prompt-data my prompts.jsonl" in job.ranks(0)
    assert not list(job.directory.glob("*.run-again"))


def test_pre_empted_with_time_to_stop(submit: Submit) -> None:
    """SLURM takes a job that ends within the partition's GraceTime for done; the script queues it again."""
    job = submit("wait", "--partition", "patient")
    job.wait_for_ranks()
    higher = job.cluster.run(
        *("sbatch", "--parsable", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=sleep 0.1")
    )
    job.start_again_now()
    job.wait_for_state("COMPLETED")
    assert "stopped at iteration 7; queued again" in job.log()
    assert job.cluster.state(higher.strip())["JobState"] == "COMPLETED"


def test_cancelled_it_is_not_queued_again(submit: Submit) -> None:
    job = submit("wait")
    job.wait_for_ranks()
    job.cluster.run("scancel", job.id)
    job.wait_for_state("CANCELLED")
    job.cluster.wait(lambda: "SLURM ends this job (COMPLETING)" in job.log(), job.log, timeout=30)
    assert job.state("Restarts") == "0"


def test_bounds_of_queueing_again(submit: Submit) -> None:
    """No more than --max-requeues, and not where the time was too short for one step."""
    bounded = submit("wait", "--max-requeues", "0", nodes=1)
    tracker = Path("other checkpoints/latest_checkpointed_iteration.txt")
    tracker.parent.mkdir()
    tracker.write_text("7")
    stuck = submit("stuck", save=str(tracker.parent), nodes=1)
    for job, why in (
        (bounded, "stopped at iteration 7; not queued again: --max-requeues is 0"),
        (stuck, "stopped at iteration 7, as it had started; not queued again: one step takes longer than the job"),
    ):
        job.wait_for_ranks(nodes=1)
        job.cluster.run("scancel", "--batch", "--signal=USR1", job.id)
        job.wait_for_state("FAILED")
        assert why in job.log()
        assert job.state("ExitCode") == "75:0"
        assert job.state("Restarts") == "0"
    assert (bounded.state("Requeue"), stuck.state("Requeue")) == ("0", "1")


def test_a_failing_node_ends_the_job(submit: Submit) -> None:
    job = submit("fail")
    job.wait_for_state("FAILED")
    assert "start 0 of node 0" in job.ranks(0)
    assert job.state("Restarts") == "0"
    assert "ended with status" in job.log() and "queued again" not in job.log()
