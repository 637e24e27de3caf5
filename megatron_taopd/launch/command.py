"""The sub-command to be launched: found among the words, and checked before a node is asked for."""

from __future__ import annotations

import difflib
import importlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_taopd.cli import COMMANDS, parse
from megatron_taopd.config_file import flag_fields
from megatron_taopd.errors import ConfigError
from megatron_taopd.platform.layout import ParallelConfig

# Words of a sub-command -> module:class of its flags, where these say what ranks it can use.
CONFIGS = {
    "train": "megatron_taopd.config:TrainConfig",
    "rollout": "megatron_taopd.config:RolloutCommandConfig",
    "score": "megatron_taopd.config:ScoreConfig",
    "eval": "megatron_taopd.evaluation.config:EvalConfig",
    "diagnose bank": "megatron_taopd.diagnostics.config:BankConfig",
    "diagnose gain": "megatron_taopd.diagnostics.config:GainConfig",
}
ONE_PROCESS = ("convert", "doctor", "plan", "report", "diagnose report", "suite table")
STOPS_ON_REQUEST = ("train", "suite run")
"""They answer a signal with a checkpoint and :data:`~megatron_taopd.exit_status.RUN_AGAIN`, and go on from there."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A sub-command with its flags, checked."""

    words: tuple[str, ...]
    """As ``taopd`` takes them: the name, then the flags."""
    config: Any = None
    """Its parsed flags; None where :data:`CONFIGS` does not know the command."""
    notes: tuple[str, ...] = field(default=())
    """What was found out, for people."""

    @property
    def name(self) -> str:
        """The sub-command."""
        return self.words[0]

    @property
    def stops_on_request(self) -> bool:
        """Whether it stops with a checkpoint when it is told to, and goes on from there."""
        return _full_name(self.words) in STOPS_ON_REQUEST

    @property
    def save(self) -> str | None:
        """Directory of a training run's checkpoints."""
        return self.config.checkpoint.save if self.name == "train" else None

    @property
    def log_dir(self) -> str | None:
        """Directory of a training run's logs."""
        return self.config.logging.log_dir if self.name == "train" else None

    def shown(self) -> str:
        """One line that a shell reads back."""
        return shlex.join(["taopd", *self.words])


def split(words: Sequence[str], config_type: type) -> tuple[list[str], list[str]]:
    """The launcher's own words, and the sub-command after ``--`` or after the last of the launcher's flags.

    Raises:
        ConfigError: there is no sub-command.
    """
    flags = flag_fields(config_type)
    index = 0
    while index < len(words):
        word = words[index]
        if word == "--":
            return list(words[:index]), _refuse_none(words[index + 1 :])
        if word in ("-h", "--help"):
            return list(words[: index + 1]), []
        if not word.startswith("-"):
            return list(words[:index]), _refuse_none(words[index:])
        name = word[2:].replace("-", "_")
        takes_value = name == "config" or (name in flags and flags[name] is not bool)
        index += 2 if takes_value else 1
    raise ConfigError(_NOTHING)


_NOTHING = (
    "there is no sub-command to launch; put it after the launcher's flags, as in "
    "`taopd launch local --nproc-per-node 2 -- train --student …`"
)


def _refuse_none(words: Sequence[str]) -> list[str]:
    if not words:
        raise ConfigError(_NOTHING)
    return list(words)


def check(words: Sequence[str], *, world_size: int, starts_again: bool = False, models: bool = True) -> Command:
    """Parse the flags of a sub-command as it will itself, and see that so many ranks can run it.

    Args:
        world_size: ranks of all nodes.
        starts_again: the same command will be run again after a stop.
        models: look whether the layout divides the models as well, which imports Megatron.

    Raises:
        ConfigError: the command, its flags, or the ranks for its layout will not do.
        SystemExit: a flag is wrong (status 2), with tyro's message.
    """
    name = words[0]
    if name not in COMMANDS or name == "launch":
        known = [command for command in COMMANDS if command != "launch"]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no sub-command {name!r} to launch{hint} Available: {', '.join(known)}")
    full_name = _full_name(words)
    if {name, full_name} & set(ONE_PROCESS) and world_size > 1:
        raise ConfigError(
            f"taopd {full_name} works in one process and {world_size} ranks would be started; use --nproc-per-node 1 "
            "on one node"
        )
    if full_name not in CONFIGS:
        return Command(words=tuple(words))
    module, config_name = CONFIGS[full_name].split(":")
    flags = words[len(full_name.split()) :]
    config = parse(getattr(importlib.import_module(module), config_name), flags, name=full_name)
    notes = _check_ranks(config, world_size, models)
    if name == "train" and starts_again:
        _check_resumes(config.checkpoint.save, config.checkpoint.load)
    return Command(words=tuple(words), config=config, notes=tuple(notes))


def _full_name(words: Sequence[str]) -> str:
    """``diagnose bank`` and its like where a sub-command has actions, else the sub-command."""
    two = " ".join(words[:2])
    return two if two in {*CONFIGS, *ONE_PROCESS, *STOPS_ON_REQUEST} else words[0]


def _check_ranks(config: Any, world_size: int, look_into_models: bool) -> list[str]:
    student: ParallelConfig = config.parallel
    student.check_world_size(world_size)
    replicas = world_size // student.model_parallel_size
    notes = [f"{world_size} ranks = {_sizes(student)} x {replicas} replicas"]
    teacher = student
    if hasattr(config, "teacher_parallel"):
        own = config.teacher_parallel.resolve(student)
        if own is not None:
            own.check_world_size(world_size)
            notes.append(f"teacher: {_sizes(own)} x {world_size // own.model_parallel_size} replicas")
            teacher = own
    if hasattr(config, "batch"):
        config.batch.per_replica(student, replicas)
    if look_into_models:
        for directory, layout in _models(config, student, teacher):
            notes += _check_model(directory, layout)
    return notes


def _models(config: Any, student: ParallelConfig, teacher: ParallelConfig) -> list[tuple[str, ParallelConfig]]:
    """Directory and layout of each model that the flags name."""
    if hasattr(config, "models"):
        teachers = [(directory, teacher) for _, directory in config.models.named_teachers()]
        return [(config.models.student, student), *teachers]
    names = [getattr(config, field, None) for field in ("student", "model", "checkpoint")]
    return [(name, student) for name in names if isinstance(name, str)]


def _sizes(layout: ParallelConfig) -> str:
    sizes = {
        "TP": layout.tensor_model_parallel_size,
        "PP": layout.pipeline_model_parallel_size,
        "CP": layout.context_parallel_size,
    }
    shown = [f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "TP"]
    if layout.expert_model_parallel_size > 1:
        shown.append(f"(EP {layout.expert_model_parallel_size})")
    return " x ".join(shown).replace(" x (", " (")


def _check_model(directory: str, layout: ParallelConfig) -> list[str]:
    """Refuse sizes that do not divide the model; a directory of the nodes alone cannot be looked into."""
    if not Path(directory).is_dir():
        return [f"{directory} is not a directory on this machine: not checked against the layout"]
    from megatron_taopd.models import check_layout, hf_directory, load_hf_config

    check_layout(load_hf_config(hf_directory(directory)), layout)
    return []


def _check_resumes(save: str | None, load: str | None) -> None:
    if save is None or save != load:
        raise ConfigError(
            f"--save {save} and --load {load}: a job that starts again goes on from its own checkpoints, so that both "
            "must name the same directory (an empty one starts a new run); or forbid it with --max-requeues 0"
        )
