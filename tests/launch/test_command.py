"""Finding the sub-command among the words, and refusing what its ranks cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_taopd import cli
from megatron_taopd.errors import ConfigError
from megatron_taopd.launch import command
from megatron_taopd.launch.config import LocalConfig
from megatron_taopd.launch.nemo_run_config import NemoRunConfig
from megatron_taopd.launch.slurm_config import SlurmConfig
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.test_cli import config_classes, flag_fields, unexplained_fields

TRAIN = ("train", "--student", "s", "--teacher", "t", "--prompt-data", "p.jsonl")


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (("--nproc-per-node", "2", "--", *TRAIN), 2),
        (("--nproc-per-node", "2", *TRAIN), 2),
        (("--nproc-per-node=2", "--dry-run", *TRAIN), 2),
        (("--no-dry-run", "--env", "train", "--env", "A=1", *TRAIN), 5),
        (("--config", "train", *TRAIN), 2),
        (TRAIN, 0),
    ],
)
def test_the_sub_command_is_found(words: tuple[str, ...], own: int) -> None:
    assert command.split(words, LocalConfig) == (list(words[:own]), list(TRAIN))


@pytest.mark.parametrize("words", [(), ("--dry-run",), ("--nproc-per-node", "2", "--")])
def test_without_a_sub_command(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="no sub-command to launch"):
        command.split(words, LocalConfig)


@pytest.mark.parametrize("config_type", [LocalConfig, SlurmConfig, NemoRunConfig])
def test_every_flag_is_explained(config_type: type, capsys: pytest.CaptureFixture[str]) -> None:
    name = {LocalConfig: "local", SlurmConfig: "slurm", NemoRunConfig: "nemo-run"}[config_type]
    with pytest.raises(SystemExit) as stop:
        cli.run(["launch", name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{field.replace('_', '-')}" in text for field in flag_fields(config_type))
    assert [unexplained_fields(kind) for kind in config_classes(config_type)] == [[]] * len(config_classes(config_type))


def check(*words: str, ranks: int = 1) -> command.Command:
    return command.check(words, world_size=ranks)


def test_ranks_are_held_against_the_layout() -> None:
    layout = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", "--sequence-parallel")
    assert check(*TRAIN, *layout, ranks=8).notes[0] == "8 ranks = TP 2 x PP 2 x 2 replicas"
    with pytest.raises(ConfigError, match="6 ranks cannot hold whole models of --tensor-model-parallel-size 2 x"):
        check(*TRAIN, *layout, ranks=6)
    with pytest.raises(ConfigError, match="8 ranks cannot hold whole sets of experts"):
        check(*TRAIN, *layout, "--expert-model-parallel-size", "3", ranks=8)
    with pytest.raises(ConfigError, match="--teacher-tensor-model-parallel-size 16 x"):
        check(*TRAIN, *layout, "--teacher-tensor-model-parallel-size", "16", ranks=8)
    with pytest.raises(ConfigError, match="--global-batch-size 8 must be a multiple of --micro-batch-size 1 x 3"):
        check(*TRAIN, ranks=3)
    with pytest.raises(ConfigError, match="wants a multiple of --pipeline-model-parallel-size 2 micro-batches"):
        check(
            *(*TRAIN, "--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"),
            *("--global-batch-size", "12"),
            ranks=8,
        )
    with pytest.raises(ConfigError, match="3 ranks cannot hold"):
        check("eval", "--model", "m", "--output", "o", "--task", "t", "--tensor-model-parallel-size", "2", ranks=3)
    with pytest.raises(ConfigError, match="3 ranks cannot hold"):
        check(
            *("diagnose", "gain", "--bank", "b", "--checkpoint", "c", "--output", "o.parquet"),
            *("--tensor-model-parallel-size", "2"),
            ranks=3,
        )


def test_models_that_are_here_are_held_against_the_layout(tmp_path: Path) -> None:
    small = save_tiny_hf_model(tmp_path / "small", "qwen3", num_heads=4, num_kv_heads=2)
    words = ("train", "--student", str(small), "--teacher", "elsewhere", "--prompt-data", "p.jsonl")
    layout = ("--tensor-model-parallel-size", "4", "--sequence-parallel")
    with pytest.raises(ConfigError, match="--tensor-model-parallel-size 4 does not divide the 2 "):
        check(*words, *layout, ranks=4)
    notes = check(*words, "--tensor-model-parallel-size", "2", ranks=4).notes
    assert notes[1:] == ("elsewhere is not a directory on this machine: not checked against the layout",)


def test_what_cannot_be_launched() -> None:
    with pytest.raises(ConfigError, match="there is no sub-command 'trian' to launch; did you mean train"):
        check("trian")
    with pytest.raises(ConfigError, match="there is no sub-command 'launch'"):
        check("launch", "local")
    with pytest.raises(ConfigError, match="taopd convert works in one process and 2 ranks would be started"):
        check("convert", "verify", ranks=2)
    with pytest.raises(ConfigError, match="taopd suite table works in one process"):
        check("suite", "table", ranks=2)
    assert check("suite", "run", ranks=2).stops_on_request
    with pytest.raises(ConfigError, match="unknown launcher 'slrum'; did you mean slurm"):
        cli.run(["launch", "slrum"])
    with pytest.raises(SystemExit) as stop:
        check(*TRAIN, "--learning-rate", "1")
    assert stop.value.code == 2
