"""The launch files of examples/slurm and examples/nemo_run: dry runs, and layouts that fit."""

from __future__ import annotations

import subprocess
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from megatron_taopd import cli
from megatron_taopd.config import TrainConfig
from megatron_taopd.launch import command
from megatron_taopd.launch.nemo_run_config import NemoRunConfig
from megatron_taopd.launch.slurm_config import SlurmConfig
from megatron_taopd.models import load_hf_config
from megatron_taopd.plan.config import PlanConfig
from megatron_taopd.plan.planning import Plan, make_plan
from tests.conftest import ROOT
from tests.examples.test_models import _flags, _words
from tests.launch import nemo

FILES = [path for name in ("slurm", "nemo_run") for path in sorted((ROOT / "examples" / name).glob("qwen*.sh"))]
NODES = {"qwen3_4b_from_32b": 8, "qwen3_8b_from_235b_a22b": 4}
MODELS = {
    "qwen3_4b_from_32b": ("qwen3_4b", "qwen3_32b"),
    "qwen3_8b_from_235b_a22b": ("qwen3_8b", "qwen3_235b_a22b"),
}


def run_file(file: Path, tmp_path: Path, taopd: str, *more: str, **variables: str) -> str:
    """Standard output of a launch file with DRY_RUN set; ``taopd`` is what the program of that name does."""
    program = tmp_path / "bin/taopd"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/usr/bin/env bash\n{taopd}\n")
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:/usr/bin:/bin", "DRY_RUN": "1", **variables}
    return subprocess.run(
        ["bash", file, *more], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def words_for_taopd(file: Path, tmp_path: Path, *more: str, **variables: str) -> list[str]:
    """What a launch file calls `taopd` with."""
    return run_file(file, tmp_path, "printf '%s\\0' \"$@\"", *more, **variables).split("\0")[:-1]


def plan_of(training: TrainConfig, num_gpus: int) -> Plan:
    """What a run takes of GPUs of 80 GB, with prompts and responses as long as its flags let them be."""
    groups = [group for group in vars(training).values() if is_dataclass(group)]
    given = {name: value for group in groups for name, value in vars(group).items()} | vars(training)
    given |= {"teacher": training.models.teacher[0], "prompt_length": training.data.max_prompt_length}
    known = {field.name for field in fields(PlanConfig)}
    config = PlanConfig(
        num_gpus=num_gpus, **{name: it for name, it in given.items() if name in known and it is not None}
    )
    return make_plan(config, load_hf_config(config.student), load_hf_config(config.teacher))


def test_both_pairs_have_both_launchers() -> None:
    assert [(file.parent.name, file.stem) for file in FILES] == [
        (launcher, pair) for launcher in ("slurm", "nemo_run") for pair in NODES
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_launch_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    student, teacher = (load_hf_config(ROOT / "examples/models/configs" / name) for name in MODELS[file.stem])
    models = {"STUDENT": str(student.path), "TEACHER": str(teacher.path)}
    words = words_for_taopd(file, tmp_path, "--keep-ratio", "0.3", ACCOUNT="lab", PARTITION="gpu", **models)
    launcher = "nemo-run" if file.parent.name == "nemo_run" else "slurm"
    assert words[:2] == ["launch", launcher]
    own, training = command.split(words[2:], NemoRunConfig if launcher == "nemo-run" else SlurmConfig)
    resources = cli.parse(NemoRunConfig if launcher == "nemo-run" else SlurmConfig, own, name="x").resources
    assert (resources.nodes, resources.nproc_per_node, resources.account) == (NODES[file.stem], 8, "lab")
    config: TrainConfig = cli.parse(TrainConfig, training[1:], name="train")
    assert config.selection.keep_ratio == 0.3

    plan = plan_of(config, resources.world_size)
    assert plan.fits, f"{plan.peak / plan.room:.2f} of a GPU"

    if launcher == "nemo-run":
        calls = f'PYTHONPATH={ROOT} NEMORUN_HOME={tmp_path} exec {nemo.python()} -m megatron_taopd "$@"'
        more = ("--keep-ratio", "0.3")
        script = run_file(file, tmp_path, calls, *more, ACCOUNT="lab", PARTITION="gpu", **models)
        script = script[script.index("#!/bin/bash") :]
    else:
        assert cli.run(words) == 0
        script = capsys.readouterr().out
    assert f"#SBATCH --nodes={resources.nodes}" in script and "--keep-ratio 0.3" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_training_is_that_of_the_recipe(tmp_path: Path) -> None:
    """4B from 32B has a recipe for one node: only the number of replicas and the paths differ."""
    recipe = _flags(_words("qwen3_4b_from_32b.sh", "--save", "s", "--load", "s", "--log-dir", "l"))
    words = words_for_taopd(FILES[0], tmp_path, "--save", "s", "--load", "s", "--log-dir", "l")
    launched = cli.parse(TrainConfig, words[words.index("train") + 1 :], name="train")
    launched.logging.tensorboard_dir = recipe.logging.tensorboard_dir
    assert launched == recipe


def test_variables_become_flags(tmp_path: Path) -> None:
    words = words_for_taopd(
        FILES[0],
        tmp_path,
        **{"NODES": "2", "TIME": "1-0", "QOS": "q", "CONTAINER_IMAGE": "i.sqsh", "CONTAINER_MOUNTS": "/a:/a /b:/c"},
        SETUP_SCRIPT="env.sh",
        OUTPUT="my run",
    )
    config = cli.parse(SlurmConfig, words[2 : words.index("--")], name="launch slurm")
    assert (config.resources.nodes, config.resources.time, config.resources.qos) == (2, "1-0", "q")
    assert config.container.container_mounts == ["/a:/a", "/b:/c"] and config.setup_script == "env.sh"
    assert words[words.index("--save") + 1] == "my run/checkpoints"
