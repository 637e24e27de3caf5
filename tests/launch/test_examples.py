"""The launch files of examples/slurm and examples/nemo_run: dry runs, and layouts that fit."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

from megatron_taopd import cli
from megatron_taopd.config import TrainConfig
from megatron_taopd.errors import ConfigError
from megatron_taopd.launch import command
from megatron_taopd.launch.nemo_run_config import NemoRunConfig
from megatron_taopd.launch.slurm_config import SlurmConfig
from megatron_taopd.models import load_hf_config
from tests.conftest import ROOT
from tests.examples.test_models import GIB, _flags, _state_bytes, _words

FILES = [path for name in ("slurm", "nemo_run") for path in sorted((ROOT / "examples" / name).glob("qwen*.sh"))]
NODES = {"qwen3_4b_from_32b": 8, "qwen3_8b_from_235b_a22b": 4}
MODELS = {
    "qwen3_4b_from_32b": ("qwen3_4b", "qwen3_32b"),
    "qwen3_8b_from_235b_a22b": ("qwen3_8b", "qwen3_235b_a22b"),
}


def words_for_taopd(file: Path, tmp_path: Path, *more: str, **variables: str) -> list[str]:
    """What a launch file calls `taopd` with; DRY_RUN is set."""
    fake = tmp_path / "bin/taopd"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\"\n")
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:/usr/bin:/bin", "DRY_RUN": "1", **variables}
    answer = subprocess.run(
        ["bash", file, *more], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    return answer.stdout.split("\0")[:-1]


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

    held = _state_bytes(student, config.parallel, resources.world_size, trained=True)
    held += _state_bytes(teacher, config.parallel, resources.world_size, trained=False)
    assert held < 40 * GIB, f"{held / GIB:.1f} GiB of weights and state a GPU"

    if launcher == "nemo-run" and importlib.util.find_spec("nemo_run") is None:
        with pytest.raises(ConfigError, match=r'pip install -e "\.\[nemo-run\]"'):
            cli.run(words)  # everything else has been checked by then
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
