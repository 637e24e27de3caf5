"""``taopd launch local``: what torchrun is told, and what the ranks find in their environment."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

from megatron_taopd import cli, exit_status
from megatron_taopd.errors import ConfigError
from megatron_taopd.launch import run_again

TRAIN = ("train", "--student", "s", "--teacher", "t", "--prompt-data", "my p.jsonl", "--lr", "1e-5")


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, str], list[str]]:
    """Variables and torchrun's words of a dry run."""
    assert cli.run(["launch", "local", "--dry-run", *words, *TRAIN]) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if "torchrun" in line)
    line = line.split(": ", 1)[1]
    shown = shlex.split(line)
    start = shown.index("torchrun")
    return dict(word.split("=", 1) for word in shown[:start]), shown[start + 1 :]


def test_one_node(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    variables, words = dry_run(capsys, "--nproc-per-node", "4", "--env", "A=b c")
    arguments = torchrun.parse_args(words)  # torchrun's own reading
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.standalone) == ("1", "4", True)
    assert (arguments.max_restarts, arguments.module, arguments.training_script) == (0, True, "megatron_taopd")
    assert arguments.training_script_args == list(TRAIN)
    assert variables["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" and variables["A"] == "b c"
    assert "NCCL_DEBUG" not in variables  # the caller's stays


def test_several_nodes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    own = ("--nnodes", "2", "--nproc-per-node", "4", "--master-addr", "node7", "--master-port", "1234")
    for rank in (0, 1):
        _, words = dry_run(capsys, *own, "--node-rank", str(rank), "--run-id", "x.1")
        arguments = torchrun.parse_args(words)
        assert (arguments.rdzv_backend, arguments.rdzv_endpoint, arguments.rdzv_id) == ("c10d", "node7:1234", "x.1")
        assert f"is_host={1 - rank}" in arguments.rdzv_conf
        assert arguments.local_addr is None
    with pytest.raises(ConfigError, match="--nnodes 2 needs --node-rank"):
        dry_run(capsys, *own)
    monkeypatch.setenv("SLURM_NODEID", "1")
    monkeypatch.setenv("SLURMD_NODENAME", "node8")
    arguments = torchrun.parse_args(dry_run(capsys, *own)[1])
    assert "is_host=0" in arguments.rdzv_conf and arguments.local_addr == "node8"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--nnodes", "2"), "--nnodes 2 needs --master-addr"),
        (("--master-addr", "x"), "--master-addr x has no effect with --nnodes 1"),
        (("--nnodes", "2", "--master-addr", "x", "--node-rank", "2"), "--node-rank 2 must be from 0 to 1"),
        (("--nproc-per-node", "0"), "--nproc-per-node 0 must be at least 1"),
        (("--max-restarts", "1"), "--save None and --load None"),
    ],
)
def test_refused(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ConfigError, SystemExit)) as refusal:
        cli.run(["launch", "local", *words, *TRAIN])
    said = f"{refusal.value} {capsys.readouterr().err}"
    assert message in " ".join(said.replace("│", " ").split())


def test_ranks_tell_of_a_stop_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sees 0, so that every node ends in order; the first rank of a node leaves the file. A refusal leaves
    another."""
    path, refused = tmp_path / "again", tmp_path / "again.refused"
    assert run_again.as_torchrun_is_told(exit_status.RUN_AGAIN) == exit_status.RUN_AGAIN
    monkeypatch.setenv(run_again.VARIABLE, str(path))
    for status in (exit_status.FINISHED, 1, exit_status.HUNG):
        assert run_again.as_torchrun_is_told(status) == status
    assert not refused.exists()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["trian"]) == exit_status.USER_ERROR and refused.exists()
    assert run_again.as_torchrun_is_told(exit_status.RUN_AGAIN) == exit_status.FINISHED
    assert not path.exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run_again.as_torchrun_is_told(exit_status.RUN_AGAIN) == exit_status.FINISHED
    assert path.exists()
