"""Flags of ``taopd launch nemo-run``; a field's docstring is its ``--help`` text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_taopd.errors import ConfigError
from megatron_taopd.launch.config import RanksConfig
from megatron_taopd.launch.slurm_config import ContainerConfig, ResourcesConfig, StoppingConfig


@dataclass(kw_only=True)
class NemoRunConfig:
    """A nemo-run experiment of one task, with nemo-run's torchrun launcher."""

    executor: Literal["local", "slurm"] = "local"
    """Where it runs: LocalExecutor on this machine, or SlurmExecutor from this login node."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    container: ContainerConfig = field(default_factory=ContainerConfig)
    experiment_dir: str | None = None
    """Directory of nemo-run's experiments, scripts and logs (default: NEMORUN_HOME, or ~/.nemo_run)."""
    ranks: RanksConfig = field(default_factory=RanksConfig)

    def __post_init__(self) -> None:
        if self.executor == "local":
            self._refuse_flags_of_slurm()
            return
        for name in ("account", "partition", "time"):
            if getattr(self.resources, name) is None:
                raise ConfigError(f"--executor slurm needs --{name}: nemo-run has no default of the cluster for it")
        if self.stopping.max_requeues == 0:
            raise ConfigError(
                "--max-requeues 0: nemo-run submits every job with --requeue; use taopd launch slurm for one that must "
                "not start again"
            )
        if self.container.container not in (None, "pyxis"):
            raise ConfigError(
                f"--container {self.container.container}: nemo-run's SlurmExecutor runs pyxis alone; use taopd launch "
                "slurm"
            )
        self.stopping.check_against(self.resources.time)
        for word in self.ranks.env:
            name, _, value = word.partition("=")
            if name != name.upper():
                raise ConfigError(f"--env {word}: nemo-run's SlurmExecutor exports names in capitals only")

    def _refuse_flags_of_slurm(self) -> None:
        if self.resources.nodes != 1:
            raise ConfigError(f"--nodes {self.resources.nodes} with --executor local, which is this machine alone")
        if self.stopping != StoppingConfig():
            raise ConfigError("--signal-before-end and --max-requeues have no effect with --executor local; drop them")
        given = vars(self.resources) | vars(self.container)
        for name in ("nodes", "nproc_per_node", "job_name"):
            del given[name]
        for name, value in given.items():
            if value not in (None, False, []):
                raise ConfigError(f"--{name.replace('_', '-')} {value} has no effect with --executor local; drop it")
