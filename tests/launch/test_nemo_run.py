"""``taopd launch nemo-run``: refusals everywhere, the rest where nemo-run is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_taopd import cli
from megatron_taopd.errors import ConfigError
from tests.launch import runs

SLURM = ("--executor", "slurm", "--account", "lab", "--partition", "gpu", "--time", "4:00:00")
TRAIN = ("train", "--student", "/m/s", "--teacher", "math=/m/t", "--prompt-data", "/d/my prompts.jsonl", "--lr", "1e-5")
SAVE = ("--save", "/r/ck", "--load", "/r/ck")
needs_nemo_run = pytest.mark.skipif(
    importlib.util.find_spec("nemo_run") is None,
    reason='nemo-run is not installed: pip install -e ".[nemo-run]" (some hundred packages, so not among dev\'s)',
)


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


@needs_nemo_run
def test_batch_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ("--nodes", "8", "--experiment-dir", str(tmp_path), "--env", "X_Y=a b;$(id)", "--sbatch-arg=--reservation=w")
    assert cli.run(["launch", "nemo-run", "--dry-run", *SLURM, *own, *TRAIN, *SAVE, "--global-batch-size", "64"]) == 0
    script = capsys.readouterr().out
    script = script[script.index("#!/bin/bash") :]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for line in (
        *("#SBATCH --account=lab", "#SBATCH --nodes=8", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=8"),
        *("#SBATCH --signal=TERM@300", "#SBATCH --time=4:00:00", "#SBATCH --reservation=w"),
        *("export CUDA_DEVICE_MAX_CONNECTIONS=1", "export TORCHELASTIC_SHUTDOWN_TIMEOUT=300"),
        *("export TORCHX_MAX_RETRIES=20", "export X_Y='a b;$(id)'"),
    ):
        assert line in script.splitlines()
    srun = next(line for line in script.splitlines() if line.startswith("srun") and "torchrun" in line)
    assert "--nnodes 8 --nproc-per-node 8" in srun and "--rdzv-backend c10d" in srun
    assert "-m megatron_taopd train --student /m/s --teacher math=/m/t --prompt-data '/d/my prompts.jsonl'" in srun
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@needs_nemo_run
@pytest.mark.slow
def test_two_ranks_on_this_machine(pool, tmp_path: Path) -> None:
    """In a process of its own: nemo-run looks at it when it ends. The weights are those of the session's ranks."""
    runs.make_files(tmp_path)
    commands = {name: runs.words(tmp_path, tmp_path / name, iters=2, response=6) for name in ("here", "there")}
    own = ("--nproc-per-node", "2", "--experiment-dir", str(tmp_path / "experiments"))
    launch = [sys.executable, "-m", "megatron_taopd", "launch", "nemo-run", *own]
    answer = subprocess.run([*launch, "--", *commands["there"]], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0 and "nemo-run: SUCCEEDED" in answer.stderr, answer.stdout + answer.stderr
    pool(2).run(runs.run, commands["here"])
    runs.assert_same_weights(tmp_path / "here", tmp_path / "there")
    failed = subprocess.run([*launch, "--", *commands["there"], "--lr", "-1"], capture_output=True, timeout=300)
    assert failed.returncode == 2
