"""A real training run on two SLURM nodes is pre-empted, loses a rank, and ends with the weights of one that did not."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from megatron_taopd import cli
from tests.launch import runs
from tests.launch.cluster import Cluster, Job

ITERATIONS = 30


def processes(job: Job, attempt: int, rank: int) -> list[psutil.Process]:
    """The process of a rank on its node."""
    wanted = {"SLURM_JOB_ID": job.id, "SLURM_RESTART_COUNT": str(attempt), "RANK": str(rank)}.items()
    found = []
    for process in psutil.process_iter():
        try:
            if wanted <= process.environ().items():
                found.append(process)
        except psutil.Error:
            continue  # it has just ended
    return found


@pytest.mark.slow
def test_pre_empted_and_killed_training_ends_as_if_it_had_not_been(
    pool, slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    runs.make_files(tmp_path)
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    save = ("--save", str(out / "checkpoints"), "--load", str(out / "checkpoints"))
    command = runs.words(tmp_path, out, iters=ITERATIONS, response=12)
    own = ("--nodes", "2", "--nproc-per-node", "1", "--gpus-per-node", "0", "--partition", "low")
    assert cli.run(["launch", "slurm", *own, "--", *command, *save, "--save-interval", "5"]) == 0
    job = Job(slurm, capsys.readouterr().out.split()[-1], out / "slurm")

    slurm.wait(lambda: len(runs.metrics(out)) >= 2, lambda: job.log() + job.ranks(0), timeout=300)
    higher = slurm.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true")
    slurm.wait(lambda: "stopped at iteration" in job.log(), lambda: job.log() + job.ranks(0), timeout=300)
    tracker = out / "checkpoints/latest_checkpointed_iteration.txt"
    stopped_at = int(tracker.read_text())
    assert 2 <= stopped_at < ITERATIONS
    assert [row["iteration"] for row in runs.metrics(out)] == list(range(1, stopped_at + 1))
    assert f"stopped at iteration {stopped_at}; SLURM ends this job (COMPLETING)" in job.log()
    assert "SIGTERM was received" in job.ranks(0) or "SIGUSR1 was received" in job.ranks(0)

    job.start_again_now()
    slurm.wait(lambda: int(tracker.read_text()) > stopped_at, lambda: job.log() + job.ranks(1), timeout=300)
    (rank,) = processes(job, attempt=1, rank=1)
    rank.kill()
    slurm.wait(lambda: "queued again" in job.log(), lambda: job.log() + job.ranks(1), timeout=300)
    killed_after = int(tracker.read_text())
    assert stopped_at < killed_after < ITERATIONS
    assert f"with a checkpoint of iteration {killed_after}; queued again" in job.log()
    assert "rank 1 ended with signal 9" in job.ranks(1)

    job.start_again_now(restarts=2)
    pool(2).run(runs.run, runs.words(tmp_path, undisturbed, iters=ITERATIONS, response=12))
    job.wait_for_state("COMPLETED", timeout=300)
    assert slurm.state(higher.strip())["JobState"] == "COMPLETED"
    assert f"resumed from iteration {stopped_at}" in job.ranks(1)
    assert f"resumed from iteration {killed_after}" in job.ranks(2)
    assert "ended with status 0" in job.log()
    assert [row["iteration"] for row in runs.metrics(out)] == list(range(1, ITERATIONS + 1))
    runs.assert_same_weights(out, undisturbed)
