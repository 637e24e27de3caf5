"""The batch script on a real SLURM: what it does when it is told to stop, pre-empted, cancelled, or fails.

The ranks are stand-ins; a real training run is in test_slurm_training.py.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
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


@pytest.fixture
def busy(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """``busy(n)``: jobs submitted from now on get no answer from squeue ``n`` times, and pauses are short."""

    def busy(failures: int) -> None:
        programs = tmp_path / "busy"
        programs.mkdir()
        squeue = f"""#!/usr/bin/env bash
            echo "$*" >> {programs}/asked
            if (($(wc -l < {programs}/asked) > {failures})); then
              exec {shutil.which("squeue", path=slurm.environment["PATH"])} "$@"
            fi
            echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
            exit 1
        """
        for name, text in {"squeue": squeue, "sleep": "#!/bin/sh\nexec /bin/sleep 0.1\n"}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)

    return busy


def test_told_to_stop_it_queues_again_and_finishes(submit: Submit, busy: Callable[[int], None]) -> None:
    """Although the controller is busy when the script first asks it."""
    busy(2)
    job = submit("wait")
    job.wait_for_ranks()
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.id)  # as SLURM does before the time limit
    job.start_again_now()
    job.wait_for_state("COMPLETED")
    assert "told to stop: time is nearly up" in job.log()
    assert job.log().count("Unable to contact slurm controller") == 2
    assert "stopped at iteration 7; queued again" in job.log()
    assert job.ranks(0).count("asked to stop: USR1") >= 2
    assert "start 1 of node 0" in job.ranks(1)
    assert "ended with status 0" in job.log()
    assert "-- train --student s --teacher t --prompt-data my prompts.jsonl" in job.ranks(0)
    assert not list(job.directory.glob("*.run-again*"))


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


def test_bounds_of_queueing_again(submit: Submit, busy: Callable[[int], None]) -> None:
    """No more than --max-requeues, not where the time was too short for one step, not without an answer of SLURM's."""
    bounded = submit("wait", "--max-requeues", "0", nodes=1)
    tracker = Path("other checkpoints/latest_checkpointed_iteration.txt")
    tracker.parent.mkdir()
    tracker.write_text("7")
    stuck = submit("stuck", save=str(tracker.parent), nodes=1)
    busy(99)
    unanswered = submit("wait", save="third checkpoints", nodes=1)
    for job, why in (
        (bounded, "stopped at iteration 7; not queued again: --max-requeues is 0"),
        (stuck, "stopped at iteration 7, as it had started; not queued again: one step takes longer than the job"),
        (unanswered, "stopped at iteration 7; not queued again: squeue does not tell how this job stands"),
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
    assert "not queued again: no checkpoint since this start" in job.log()


def test_after_a_checkpoint_a_killed_rank_costs_a_start(submit: Submit) -> None:
    job = submit("die")
    job.start_again_now()
    job.wait_for_state("COMPLETED")
    assert "ended with status 137, with a checkpoint of iteration 7; queued again" in job.log()
    assert "start 1 of node 1" in job.ranks(1)


def test_what_is_not_worth_another_start(submit: Submit) -> None:
    """A refusal, which the job's status hides; and any failure where that was asked for."""
    refused = submit("refuse")
    refused.wait_for_state("FAILED")
    unwanted = submit("die", "--no-requeue-on-failure", save="other checkpoints")
    unwanted.wait_for_state("FAILED")
    assert "ended with status 143: a rank refused to go on" in refused.log()
    assert "ended with status 137" in unwanted.log()
    for job in (refused, unwanted):
        assert job.state("Restarts") == "0" and "queued again" not in job.log()
        assert not list(job.directory.glob("*.run-again*"))


def test_a_node_that_is_gone(submit: Submit) -> None:
    """SLURM itself queues the job again."""
    job = submit("wait")
    job.wait_for_ranks()
    node = job.cluster.nodes[1]
    job.cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    job.cluster.wait(lambda: job.state("Restarts") == "1", job.log, timeout=60)
    with suppress(AssertionError):  # SLURM may have been quicker: it takes a node back that answers
        job.cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
    job.cluster.wait(job.cluster.is_idle, "idle nodes", timeout=60)
    job.start_again_now()
    job.wait_for_state("COMPLETED")
    assert "start 1 of node 1" in job.ranks(1)
