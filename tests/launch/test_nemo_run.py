"""``taopd launch nemo-run``: refusals here, the rest in nemo-run's own environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_taopd import cli
from megatron_taopd.errors import ConfigError
from tests.launch import nemo, runs
from tests.needs import missing

SNAPSHOT = Path(__file__).parent / "snapshots/nemo_run/train_8_nodes.sh"
SLURM = ("--executor", "slurm", "--account", "lab", "--partition", "gpu", "--time", "4:00:00")
TRAIN = ("train", "--student", "/m/s", "--teacher", "math=/m/t", "--prompt-data", "/d/my prompts.jsonl", "--lr", "1e-5")
SAVE = ("--save", "/r/ck", "--load", "/r/ck")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*SLURM, *TRAIN), "--save None and --load None"),
        ((*SLURM[:-2], *TRAIN, *SAVE), "--executor slurm needs --time"),
        ((*SLURM, "--max-requeues", "0", *TRAIN, *SAVE), "nemo-run submits every job with --requeue"),
        ((*SLURM, "--env", "a=1", *TRAIN, *SAVE), "--env a=1: nemo-run's SlurmExecutor exports names in capitals"),
        (
            (*SLURM, "--container", "apptainer", "--container-image", "x", *TRAIN, *SAVE),
            "nemo-run's SlurmExecutor runs pyxis alone",
        ),
        ((*SLURM, *TRAIN, *SAVE, "--log-dir", "runs"), "--log-dir runs: nemo-run's job runs in a directory of its own"),
        ((*SLURM, *TRAIN, *SAVE, "--teacher=code=there"), "--teacher there: nemo-run's job"),
        ((*SLURM, *TRAIN, *SAVE, "--log-dir", "/$HOME"), "nemo-run replaces what follows a dollar sign"),
        (("--partition", "gpu", *TRAIN), "--partition gpu has no effect with --executor local"),
        (("--nodes", "2", *TRAIN), "--nodes 2 with --executor local, which is this machine alone"),
        (("--max-requeues", "3", *TRAIN), "--signal-before-end and --max-requeues have no effect"),
        (("--nproc-per-node", "3", *TRAIN), "--global-batch-size 8 must be a multiple of --micro-batch-size 1 x 3"),
    ],
)
def test_refused(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ConfigError, SystemExit)) as refusal:
        cli.run(["launch", "nemo-run", "--dry-run", *words])
    said = f"{refusal.value} {capsys.readouterr().err}"
    assert message in " ".join(said.replace("│", " ").split())


def test_without_nemo_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[nemo-run\]"'):
        cli.run(["launch", "nemo-run", "--dry-run", *SLURM, *TRAIN, *SAVE])  # everything else has been checked by then


def test_batch_script(tmp_path: Path) -> None:
    """nemo-run's, with our flags and environment in it; WRITE_SNAPSHOTS=1 as in test_slurm_script.py."""
    own = ("--nodes", "8", "--experiment-dir", str(tmp_path / "lab"), "--env", "X_Y=a b;$(id)")
    words = [*SLURM, *own, "--sbatch-arg=--reservation=w", *TRAIN, *SAVE, "--global-batch-size", "64"]
    launch = [nemo.python(), "-m", "megatron_taopd", "launch", "nemo-run", "--dry-run"]
    answer = subprocess.run([*launch, *words], env=nemo.environment(tmp_path), capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    script = answer.stdout[answer.stdout.index("#!/bin/bash") :]
    assert not [path for path in (tmp_path / "lab").rglob("*") if path.is_file()]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    script = script.replace(str(tmp_path), "/here")
    for changing, shown in ((r"taopd-train_\d+", "taopd-train_TIME"), (r"--rdzv-id \d+", "--rdzv-id NUMBER")):
        script = re.sub(changing, shown, script)
    if os.environ.get("WRITE_SNAPSHOTS") == "1":
        SNAPSHOT.write_text(script)
    assert script == SNAPSHOT.read_text()


def test_shellcheck_finds_what_is_nemo_runs_own() -> None:
    """Words without quotes that its template has around ours; the dollar sign in a value of --env is meant (SC2016)."""
    if shutil.which("shellcheck") is None:
        missing("no shellcheck")
    lines = SNAPSHOT.read_text().splitlines()
    words = ["shellcheck", "--format=json", "--exclude=SC2016", SNAPSHOT]
    answer = subprocess.run(words, capture_output=True, text=True)
    found = {lines[it["line"] - 1][it["column"] - 1 : it["endColumn"] - 1] for it in json.loads(answer.stdout)}
    theirs = {"$( scontrol show hostnames $SLURM_JOB_NODELIST )", "$nodes", "$SLURM_JOB_NODELIST"}
    assert found == theirs | {"$head_node_ip", "$SLURM_NODEID", "${SLURM_RESTART_COUNT:-0}"}


@pytest.mark.slow
def test_two_ranks_on_this_machine(pool, tmp_path: Path) -> None:
    """The weights are those of the session's ranks."""
    runs.make_files(tmp_path)
    commands = {name: runs.words(tmp_path, tmp_path / name, iters=2, response=6) for name in ("here", "there")}
    launch = [nemo.python(), "-m", "megatron_taopd", "launch", "nemo-run", "--nproc-per-node", "2"]
    answer = subprocess.run(
        [*launch, "--", *commands["there"]],
        env=nemo.environment(tmp_path / "experiments"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0 and "nemo-run: SUCCEEDED" in answer.stderr, answer.stdout + answer.stderr
    pool(2).run(runs.run, commands["here"])
    runs.assert_same_weights(tmp_path / "here", tmp_path / "there")
