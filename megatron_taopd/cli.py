"""The command line: ``taopd SUB-COMMAND --flags``, the same words under ``torchrun -m megatron_taopd``."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from megatron_taopd import __version__
from megatron_taopd.errors import ConfigError, TaopdError
from megatron_taopd.exit_status import USER_ERROR
from megatron_taopd.launch.run_again import as_torchrun_is_told

# Sub-command -> (module:function, one line for --help). Modules are imported when called, so that --help is quick.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("megatron_taopd.commands.train:train", "distil a teacher into a student on its own responses"),
    "rollout": (
        "megatron_taopd.commands.rollout:rollout",
        "a student's responses to a prompt file, as JSONL",
    ),
    "score": ("megatron_taopd.commands.score:score", "statistics, scores and keep mask of recorded rollouts"),
    "eval": (
        "megatron_taopd.commands.eval:evaluate_command",
        "answer problems with a model, and how many are right",
    ),
    "convert": (
        "megatron_taopd.commands.convert:convert",
        "checkpoints: Hugging Face to Megatron and back; verify",
    ),
    "suite": ("megatron_taopd.commands.suite:suite", "methods x budgets x seeds from one file, and their table"),
    "report": ("megatron_taopd.commands.report:report", "one HTML page about a run, or about a suite of runs"),
    "launch": ("megatron_taopd.commands.launch:launch", "any of these on several ranks: here, SLURM, nemo-run"),
    "diagnose": (
        "megatron_taopd.commands.diagnose:diagnose",
        "where did a checkpoint close the gap to its teacher? On frozen contexts",
    ),
    "plan": ("megatron_taopd.commands.plan:plan", "does it fit on these GPUs, and how long does a step take at least?"),
    "doctor": ("megatron_taopd.commands.doctor:doctor", "what this machine has, and what will be used"),
}


def usage() -> str:
    """The text of ``taopd --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            f"taopd {__version__}: teachability-aware on-policy distillation on Megatron-Core",
            "",
            "usage: taopd SUB-COMMAND [--config FILE.yaml] [--flags ...]",
            "       torchrun --nproc-per-node N -m megatron_taopd SUB-COMMAND ...",
            "",
            *lines,
            "",
            "taopd SUB-COMMAND --help explains every flag.",
        ]
    )


def parse(config_type: type, words: Sequence[str], *, name: str) -> Any:
    """Parse flags (and ``--config``) into a configuration.

    Raises:
        ConfigError: a bad ``--config`` file.
        SystemExit: a bad flag (status 2, the message and nearest flags on standard error) or ``--help`` (status 0).
    """
    import tyro

    from megatron_taopd.config_file import read_config_file

    words, path = _take_config_path(list(words))
    if path is not None:
        words = read_config_file(path, config_type, instead=words) + words
    if not sys.stderr.isatty():
        os.environ.setdefault("COLUMNS", "160")  # boxed messages of a log file are not to be cut at 80
    return tyro.cli(
        config_type,
        args=words,
        prog=f"taopd {name}",
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=int(os.environ.get("RANK", "0")) == 0,
    )


def _take_config_path(words: list[str]) -> tuple[list[str], str | None]:
    for index, word in enumerate(words):
        if word == "--config":
            if index + 1 == len(words):
                raise ConfigError("--config needs a YAML file after it")
            return words[:index] + words[index + 2 :], words[index + 1]
        if word.startswith("--config="):
            return words[:index] + words[index + 1 :], word.removeprefix("--config=")
    return words, None


def run(words: Sequence[str]) -> int:
    """Run a sub-command in this process; user errors are raised as ``TaopdError``. Returns the exit status."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    name = words[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown sub-command {name!r}{hint} Available: {', '.join(COMMANDS)}")
    module_name, function_name = COMMANDS[name][0].split(":")
    return getattr(importlib.import_module(module_name), function_name)(list(words[1:])) or 0


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of ``taopd``: the command's exit status, or 2 after a user error, printed in one paragraph."""
    try:
        return as_torchrun_is_told(run(sys.argv[1:] if words is None else words))
    except TaopdError as error:
        rank = os.environ.get("RANK")
        where = f" (rank {rank})" if rank not in (None, "0") else ""
        print(f"taopd: error{where}: {error}", file=sys.stderr, flush=True)
        return as_torchrun_is_told(USER_ERROR)
