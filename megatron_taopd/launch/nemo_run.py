"""``taopd launch nemo-run``: the one module that imports nemo-run."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_taopd.errors import ConfigError
from megatron_taopd.exit_status import FINISHED
from megatron_taopd.launch import command as commands
from megatron_taopd.launch.command import Command
from megatron_taopd.launch.nemo_run_config import NemoRunConfig

FILES = (
    *("--student", "--teacher", "--prompt-data", "--rollout-data", "--config", "--save", "--load", "--log-dir"),
    *("--tensorboard-dir", "--export-hf", "--output"),
)
"""Flags whose values are paths."""


def launch(config: NemoRunConfig, words: Sequence[str]) -> int:
    """Run or submit the experiment; with ``--dry-run`` print what nemo-run would do. Returns the exit status."""
    on_slurm = config.executor == "slurm"
    command = commands.check(words, world_size=config.resources.world_size, starts_again=on_slurm)
    for note in (*command.notes, f"command: {command.shown()}"):
        print(f"> {note}", file=sys.stderr, flush=True)
    if on_slurm:
        _refuse_what_nemo_run_changes(command)
    run = _import_nemo_run()
    executor = _slurm_executor(run, config, command) if on_slurm else _local_executor(run, config)
    title = config.resources.job_name or f"taopd-{command.name}"
    script = run.Script(path="megatron_taopd", m=True, entrypoint="python", args=list(command.words))
    directory = None if config.experiment_dir is None else str(Path(config.experiment_dir).absolute())
    with run.Experiment(title, executor=executor, base_dir=directory) as experiment:
        experiment.add(script, name=command.name, tail_logs=not on_slurm)
        if config.ranks.dry_run:
            return _dry_run(experiment, on_slurm)
        experiment.run(detach=on_slurm)
    if on_slurm:
        return FINISHED
    status = str(experiment.jobs[0].state)  # leaving the block has waited for the end
    print(f"> nemo-run: {status}", file=sys.stderr, flush=True)
    return FINISHED if status.endswith("SUCCEEDED") else 1


def _import_nemo_run() -> Any:
    try:
        import nemo_run
    except ImportError as error:
        raise ConfigError(f'nemo-run cannot be imported ({error}); pip install -e ".[nemo-run]"') from error
    return nemo_run


def _dry_run(experiment: Any, on_slurm: bool) -> int:
    """Print nemo-run's request; its own way of printing a batch script breaks the lines."""
    experiment.dryrun(log=not on_slurm, delete_exp_dir=False)
    executor = experiment.jobs[0].executor
    if on_slurm:
        print(Path(executor.experiment_dir, f"{executor.job_name}_sbatch.sh").read_text(encoding="utf-8"), flush=True)
    shutil.rmtree(executor.experiment_dir)
    return FINISHED


def _local_executor(run: Any, config: NemoRunConfig) -> Any:
    variables = config.ranks.changes(os.environ, threads=1)
    # nemo-run starts `torchrun` by name: the one of this Python is meant.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if shutil.which("torchrun", path=path) is None:
        raise ConfigError(f"there is no torchrun beside {sys.executable}, which nemo-run starts; install torch there")
    return run.LocalExecutor(
        ntasks_per_node=config.resources.nproc_per_node,
        launcher="torchrun",
        env_vars=variables | {"PATH": path},
        packager=run.Packager(),
    )


def _slurm_executor(run: Any, config: NemoRunConfig, command: Command) -> Any:
    resources, stopping = config.resources, config.stopping
    threads = max(1, (resources.cpus_per_task or 1) // resources.nproc_per_node)
    variables = config.ranks.environment(threads=threads)
    signal = None
    if command.stops_on_request and stopping.signal_before_end:
        # The signal goes to torchrun, which hands SIGTERM to the ranks and gives them this long to write and stop.
        signal = f"TERM@{stopping.signal_before_end}"
        variables["TORCHELASTIC_SHUTDOWN_TIMEOUT"] = str(stopping.signal_before_end)
    executor = run.SlurmExecutor(
        account=resources.account,
        partition=resources.partition,
        qos=resources.qos,
        time=resources.time,
        nodes=resources.nodes,
        ntasks_per_node=resources.nproc_per_node,
        gpus_per_node=None if resources.gres is not None else resources.num_gpus or None,
        gres=resources.gres,
        cpus_per_task=resources.cpus_per_task,
        mem=resources.mem,
        exclusive=True if resources.exclusive else None,
        constraint=resources.constraint,
        signal=signal,
        additional_parameters=dict(_sbatch_option(word) for word in resources.sbatch_arg) or None,
        container_image=config.container.container_image,
        container_mounts=list(config.container.container_mounts),
        env_vars={name: shlex.quote(value) for name, value in variables.items()},  # exported as they stand
        launcher="torchrun",
        packager=run.Packager(),
        tunnel=run.LocalTunnel(job_dir=str(Path(config.experiment_dir or _home()).absolute())),
    )
    executor.retries = stopping.max_requeues
    return executor


def _home() -> str:
    return os.environ.get("NEMORUN_HOME", os.path.expanduser("~/.nemo_run"))


def _sbatch_option(word: str) -> tuple[str, Any]:
    name, equals, value = word.removeprefix("--").partition("=")
    return name, value if equals else True


def _refuse_what_nemo_run_changes(command: Command) -> None:
    """nemo-run's batch script enters a directory of its own and replaces dollar signs."""
    for flag, value in zip(command.words, [*command.words[1:], ""], strict=True):
        if "$" in flag:
            raise ConfigError(f"{flag!r}: nemo-run replaces what follows a dollar sign; write it without")
        name, equals, attached = flag.partition("=")
        path = (attached if equals else value).rpartition("=")[2]  # of NAME=DIRECTORY, the directory
        if name in FILES and not Path(path).is_absolute():
            raise ConfigError(
                f"{name} {path}: nemo-run's job runs in a directory of its own, so that paths must be absolute"
            )
