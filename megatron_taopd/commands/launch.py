"""``taopd launch local | slurm | nemo-run``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

from megatron_taopd.cli import parse
from megatron_taopd.errors import ConfigError
from megatron_taopd.launch import command
from megatron_taopd.launch.config import LocalConfig
from megatron_taopd.launch.nemo_run_config import NemoRunConfig
from megatron_taopd.launch.slurm_config import SlurmConfig


def launch(words: Sequence[str]) -> int:
    """Dispatch to one of :data:`LAUNCHERS`; returns the exit status."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name = words[0]
    if name not in LAUNCHERS:
        near = difflib.get_close_matches(name, LAUNCHERS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown launcher {name!r}{hint} Available: {', '.join(LAUNCHERS)}")
    config_type, start, _ = LAUNCHERS[name]
    own, sub_command = command.split(words[1:], config_type)
    return start(parse(config_type, own, name=f"launch {name}"), sub_command)


def usage() -> str:
    """The text of ``taopd launch --help``."""
    width = max(map(len, LAUNCHERS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, _, summary) in LAUNCHERS.items()]
    return "\n".join(
        [
            "usage: taopd launch WHERE [--config FILE.yaml] [--flags ...] [--] SUB-COMMAND ...",
            "",
            *lines,
            "",
            "taopd launch WHERE --help explains every flag; --dry-run checks and prints everything.",
        ]
    )


def _local(config: LocalConfig, words: Sequence[str]) -> int:
    from megatron_taopd.launch.local import launch

    return launch(config, words)


def _slurm(config: SlurmConfig, words: Sequence[str]) -> int:
    from megatron_taopd.launch.slurm import launch

    return launch(config, words)


def _nemo_run(config: NemoRunConfig, words: Sequence[str]) -> int:
    from megatron_taopd.launch.nemo_run import launch

    return launch(config, words)


LAUNCHERS: dict[str, tuple[type, Callable[[Any, Sequence[str]], int], str]] = {
    "local": (LocalConfig, _local, "torchrun on this machine, alone or as one node of several"),
    "slurm": (SlurmConfig, _slurm, "a batch job that checkpoints before its time is up and queues again"),
    "nemo-run": (NemoRunConfig, _nemo_run, "a nemo-run experiment, here or on a SLURM cluster"),
}
