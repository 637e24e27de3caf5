"""The batch script: as it was last agreed upon, and as bash and shellcheck want it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_taopd import __version__, cli
from megatron_taopd.errors import ConfigError
from megatron_taopd.exit_status import RUN_AGAIN
from megatron_taopd.launch.slurm_config import time_limit_seconds
from tests.needs import missing

SNAPSHOTS = Path(__file__).with_name("snapshots")
TRAIN = (
    *("train", "--student", "Qwen3-4B", "--teacher", "Qwen3-32B", "--prompt-data", "my prompts.jsonl"),
    *("--global-batch-size", "128", "--tensor-model-parallel-size", "4", "--sequence-parallel", "--bf16"),
    *("--save", "run/checkpoints", "--load", "run/checkpoints", "--log-dir", "run"),
)
PYXIS = (
    *("--container", "pyxis", "--container-image", "nvcr.io#nvidia/pytorch:25.10-py3"),
    *("--container-mounts", "/data:/data", "--container-mounts", "/models:/models:ro"),
)
# Launcher's flags, and the sub-command. One name, one file of the same name.
SCRIPTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train_8_nodes": (
        (
            *("--nodes", "8", "--time", "4:00:00", "--partition", "gpu", "--account", "lab", "--exclusive"),
            *("--cpus-per-task", "64", "--python", "/shared/venv/bin/python", "--setup-script", "/shared/setup.sh"),
        ),
        TRAIN,
    ),
    "train_pyxis": (
        (
            *("--nodes", "2", "--time", "1-0", "--gres", "gpu:h100:8", *PYXIS, "--signal-before-end", "600"),
            *(
                "--max-requeues",
                "5",
                "--max-restarts",
                "1",
                "--srun-arg=--mpi=none",
                "--env",
                "NCCL_IB_HCA=mlx5_0,mlx5_1",
            ),
            *("--env", "CUDA_DEVICE_MAX_CONNECTIONS=32", "--job-name", "distil", "--qos", "high"),
            *("--sbatch-arg=--reservation=weekend", "--sbatch-arg=--comment=two words"),
        ),
        TRAIN,
    ),
    "train_apptainer": (
        (
            "--job-dir",
            "/logs",
            "--container",
            "apptainer",
            "--container-image",
            "/images/taopd.sif",
            "--container-mounts",
            "/data:/data",
        ),
        (*TRAIN[:-6], "--save", "/ck", "--load", "/ck"),
    ),
    "suite": (
        ("--nproc-per-node", "4", "--job-dir", "/logs/of me/100%", "--python", "python3"),
        ("suite", "run", "--suite", "suite.yaml", "--out", "out"),
    ),
    "convert": (
        (
            *("--nproc-per-node", "1", "--gpus-per-node", "0", "--mem", "64G", "--python", "python3"),
            *("--max-requeues", "0"),
        ),
        ("convert", "hf-to-megatron", "--source", "it's here", "--output", "there"),
    ),
}


def render(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a dry run prints, as in a directory /here."""
    assert cli.run(["launch", "slurm", "--dry-run", *words]) == 0
    text = capsys.readouterr().out
    return text.replace(f"taopd {__version__}.", "taopd VERSION.").replace(str(Path.cwd()), "/here")


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A change that is meant is written by a run with WRITE_SNAPSHOTS=1, and read by a person."""
    own, command = SCRIPTS[name]
    text = render(capsys, *own, "--", *command)
    if os.environ.get("WRITE_SNAPSHOTS") == "1":
        (SNAPSHOTS / f"{name}.sh").write_text(text)
    assert text == (SNAPSHOTS / f"{name}.sh").read_text()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        missing("no shellcheck")
    files = sorted(SNAPSHOTS.glob("*.sh"))
    assert {file.stem for file in files} == set(SCRIPTS)
    answer = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


def test_bash_reads_every_word_back(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is in a flag stays one word and is not carried out."""
    evil = ["$(touch /tmp/evil)", "a b", "it's", '"', "*", "~", "`id`", "a;b", "#x", "", "-- ", "$HOME", "a,b"]
    words = ["doctor", *evil]
    text = render(capsys, "--nproc-per-node", "1", "--env", "X=`id` $Y 'z'", "--", *words)
    start = text.index("ranks=(")
    array = text[start : text.index("\n)\n", start) + 3]
    print_words = "run_again=again\n" + array + "printf '%s\\0' \"${ranks[@]}\""
    answer = subprocess.run(["bash", "-c", print_words], capture_output=True, text=True, check=True)
    seen = answer.stdout.split("\0")[:-1]
    assert seen[seen.index("--") + 1 :] == words
    assert "X=`id` $Y 'z'" in seen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nodes", "3"), "--global-batch-size 128 must be a multiple of --micro-batch-size 1 x 6"),
        (("--nproc-per-node", "6"), "6 ranks cannot hold whole models of --tensor-model-parallel-size 4"),
        (("--time", "5"), "--signal-before-end 300 seconds leave nothing of --time 5"),
        (("--time", "soon"), "--time 'soon' must be minutes, H:M:S, D-H or D-H:M:S"),
        (("--gpus-per-node", "4"), "--gpus-per-node 4 and --nproc-per-node 8: every rank has one GPU"),
        (("--container-image", "x.sif"), "--container None and --container-image x.sif go together"),
        (("--container-mounts", "/a:/a"), "--container-mounts /a:/a has no effect"),
        (("--sbatch-arg=--nodes=4",), "--sbatch-arg=--nodes=4 is set by this launcher"),
        (("--env", "A B=1"), "--env 'A B=1' must be NAME=VALUE"),
        (("--env", "A=1\nrm -rf x"), "line breaks"),
        (("--job-dir", "a\nb"), "line breaks"),
        (("--job-name", "x\n#SBATCH"), "--job-name"),
        (("--partition", "a b"), "must be one word"),
    ],
)
def test_refused(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ConfigError, SystemExit)) as refusal:
        cli.run(["launch", "slurm", "--dry-run", *words, "--", *TRAIN])
    said = f"{refusal.value} {capsys.readouterr().err}"
    assert message in " ".join(said.replace("│", " ").split()), said


def test_a_job_that_starts_again_goes_on_from_its_own_checkpoints() -> None:
    command = [*TRAIN[:-4], "--load", "elsewhere", *TRAIN[-2:]]
    with pytest.raises(ConfigError, match="--save run/checkpoints and --load elsewhere: .*--max-requeues 0"):
        cli.run(["launch", "slurm", "--dry-run", "--", *command])
    assert cli.run(["launch", "slurm", "--dry-run", "--max-requeues", "0", "--", *command]) == 0


def test_without_sbatch_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="sbatch is not on this machine's path"):
        cli.run(["launch", "slurm", "--", *TRAIN])
    assert not list(tmp_path.iterdir())


def test_a_start_too_many_ends_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After pre-emption SLURM counts; the status says that there is more to do."""
    script = render(capsys, "--max-requeues", "3", "--job-dir", str(tmp_path), "--", *TRAIN)
    variables = {"SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": "4", "PATH": os.environ["PATH"]}
    answer = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True)
    assert answer.returncode == RUN_AGAIN, answer.stderr
    assert "this job started again 4 times and --max-requeues is 3; submit it anew" in answer.stdout


def test_time_limits() -> None:
    """The spellings of sbatch's manual."""
    assert time_limit_seconds("90") == 90 * 60
    assert time_limit_seconds("90:30") == 90 * 60 + 30
    assert time_limit_seconds("4:00:00") == 4 * 3600
    assert time_limit_seconds("1-12") == 36 * 3600
    assert time_limit_seconds("1-12:30") == 36 * 3600 + 30 * 60
    assert time_limit_seconds("1-12:30:05") == 36 * 3600 + 30 * 60 + 5
