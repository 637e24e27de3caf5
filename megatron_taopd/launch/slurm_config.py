"""Flags of ``taopd launch slurm``; a field's docstring is its ``--help`` text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from megatron_taopd.errors import ConfigError
from megatron_taopd.launch.config import RanksConfig, refuse_control_characters

_JOB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")


@dataclass(kw_only=True)
class ContainerConfig:
    """A container around the ranks."""

    container: Literal["pyxis", "apptainer"] | None = None
    """How containers run on the cluster: pyxis (srun's --container-image, with enroot) or apptainer."""
    container_image: str | None = None
    """Image: what pyxis or apptainer calls it."""
    container_mounts: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """SOURCE:TARGET, the flag again for each. The working directory and --job-dir are mounted by themselves."""

    def __post_init__(self) -> None:
        if (self.container is None) != (self.container_image is None):
            raise ConfigError(
                f"--container {self.container} and --container-image {self.container_image} go together; give both or "
                "none"
            )
        if self.container is None and self.container_mounts:
            raise ConfigError(
                f"--container-mounts {self.container_mounts[0]} has no effect without --container and --container-image"
            )
        for mount in self.container_mounts:
            if "," in mount:
                raise ConfigError(f"--container-mounts {mount!r}: one mount a flag, without commas")
            refuse_control_characters("--container-mounts", mount)


@dataclass(kw_only=True)
class ResourcesConfig:
    """What is asked of SLURM; spelled as sbatch spells it."""

    job_name: str | None = None
    """Name of the job (default: taopd-SUB-COMMAND)."""
    nodes: int = 1
    """Nodes."""
    nproc_per_node: int = 8
    """Ranks a node, one a GPU."""
    gpus_per_node: int | None = None
    """GPUs a node (default: --nproc-per-node); 0 asks for none."""
    gres: str | None = None
    """Ask for GPUs by this instead, where a cluster wants it: gpu:8 or gpu:h100:8."""
    cpus_per_task: int | None = None
    """Cores a node: its one task has all ranks (default: the cluster's)."""
    mem: str | None = None
    """Memory a node; 0 is all of it (default: the cluster's)."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    time: str | None = None
    """Time limit, as 4:00:00 or 1-12 (default: the partition's)."""
    account: str | None = None
    """Account to charge."""
    partition: str | None = None
    """Partition."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    sbatch_arg: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Any other option of sbatch, as --sbatch-arg=--reservation=NAME; the flag again for each."""

    def __post_init__(self) -> None:
        for name in ("nodes", "nproc_per_node", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.gres is not None and self.gpus_per_node is not None:
            raise ConfigError(f"--gres {self.gres} and --gpus-per-node {self.gpus_per_node}: keep one of them")
        if self.gpus_per_node not in (None, 0, self.nproc_per_node):
            raise ConfigError(
                f"--gpus-per-node {self.gpus_per_node} and --nproc-per-node {self.nproc_per_node}: every rank has one "
                "GPU; make them equal, or ask for 0 GPUs to run on CPUs"
            )
        if self.job_name is not None and not _JOB_NAME.fullmatch(self.job_name):
            raise ConfigError(f"--job-name {self.job_name!r} may have letters, digits, dots, hyphens and underscores")
        for name in ("gres", "mem", "time", "account", "partition", "qos", "constraint"):
            value = getattr(self, name)
            if value is not None and (not value or not value.isprintable() or " " in value):
                raise ConfigError(f"--{name} {value!r} must be one word")
        if self.time is not None:
            time_limit_seconds(self.time)
        for word in self.sbatch_arg:
            if not word.startswith("--") or not word.isprintable():
                raise ConfigError(f"--sbatch-arg {word!r} must be an option of sbatch as --sbatch-arg=--NAME=VALUE")
            if word.split("=")[0] in _SBATCH_TAKEN:
                raise ConfigError(f"--sbatch-arg={word} is set by this launcher; use its own flag")

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.nproc_per_node

    @property
    def num_gpus(self) -> int:
        """GPUs a node that are asked for, by whatever flag."""
        return self.nproc_per_node if self.gpus_per_node is None else self.gpus_per_node


_SBATCH_TAKEN = (
    "--chdir --constraint --cpus-per-task --exclusive --gpus-per-node --gres --job-name --mem --nodes --ntasks "
    "--ntasks-per-node --open-mode --output --partition --qos --requeue --no-requeue --signal --time --account "
    "--parsable --array"
).split()


@dataclass(kw_only=True)
class StoppingConfig:
    """How a job ends that is not done."""

    signal_before_end: int = 300
    """Seconds before the time limit at which training is told to write a checkpoint and stop; more than a step and a
    checkpoint take. 0: it is not told."""
    max_requeues: int = 20
    """How often the job may start again in all: by itself after such a stop, by SLURM after pre-emption or the failure
    of a node. 0: never."""

    def __post_init__(self) -> None:
        for name in ("signal_before_end", "max_requeues"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} must not be negative")

    def check_against(self, time: str | None) -> None:
        """Refuse a signal that would come before the start.

        Raises:
            ConfigError: the time limit is not longer.
        """
        if time is not None and self.signal_before_end >= time_limit_seconds(time):
            raise ConfigError(
                f"--signal-before-end {self.signal_before_end} seconds leave nothing of --time {time}; lower it, or "
                "lengthen the job"
            )


@dataclass(kw_only=True)
class SlurmConfig:
    """A job of one torchrun a node, which checkpoints before its time is up and queues again."""

    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    container: ContainerConfig = field(default_factory=ContainerConfig)
    job_dir: str | None = None
    """Directory on a shared file system for the script and the logs (default: slurm/ in the --log-dir of the command,
    or here)."""
    python: str | None = None
    """Python on the nodes (default: this one; python3 in a container)."""
    setup_script: str | None = None
    """Shell file to source on the first node before the ranks start everywhere: modules, a virtual environment."""
    srun_arg: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Any other option of srun, as --srun-arg=--mpi=none; the flag again for each."""
    max_restarts: int = 0
    """Start the ranks anew within the job so many times where one has failed; they go on from the last checkpoint."""
    requeue_on_failure: bool = True
    """Queue the job again, too, when ranks have died or hung (any status but 2: refused), if there is a checkpoint of
    this start; --max-requeues bounds it."""
    ranks: RanksConfig = field(default_factory=RanksConfig)

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise ConfigError(f"--max-restarts {self.max_restarts} must not be negative")
        self.stopping.check_against(self.resources.time)
        for word in self.srun_arg:
            if not word.startswith("--") or not word.isprintable():
                raise ConfigError(f"--srun-arg {word!r} must be an option of srun as --srun-arg=--NAME=VALUE")
        for name in ("job_dir", "python", "setup_script"):
            value = getattr(self, name)
            if value is not None:
                refuse_control_characters(f"--{name.replace('_', '-')}", value)


def time_limit_seconds(time: str) -> int:
    """Seconds of a time limit in SLURM's spellings: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        ConfigError: it is none of them.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        raise ConfigError(f"--time {time!r} must be minutes, H:M:S, D-H or D-H:M:S")
    numbers = [int(number) for number in match["fields"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return (hours * 60 + minutes) * 60 + seconds
