"""Flags of ``taopd launch local`` and of all launchers; a field's docstring is its ``--help`` text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from megatron_taopd.errors import ConfigError

_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(kw_only=True)
class RanksConfig:
    """What every launcher gives to the ranks."""

    env: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """NAME=VALUE for the ranks, over the defaults; the flag again for each."""
    dry_run: bool = False
    """Check and print everything, start nothing."""

    def __post_init__(self) -> None:
        for word in self.env:
            name, equals, value = word.partition("=")
            if not equals or not _ENVIRONMENT_NAME.fullmatch(name):
                raise ConfigError(f"--env {word!r} must be NAME=VALUE, with a name of letters, digits and underscores")
            refuse_control_characters("--env", value)

    def environment(self, *, threads: int) -> dict[str, str]:
        """Variables of the ranks: the defaults, and over them what was given."""
        return environment(threads) | {name: value for name, _, value in (word.partition("=") for word in self.env)}

    def changes(self, environment: Mapping[str, str], *, threads: int) -> dict[str, str]:
        """Those of :meth:`environment` that are to be set: what is there already stays, unless it was given."""
        given = {word.partition("=")[0] for word in self.env}
        wanted = self.environment(threads=threads)
        return {name: value for name, value in wanted.items() if name in given or name not in environment}


def environment(threads: int) -> dict[str, str]:
    """What ranks on GPUs want to find in their environment; without effect on a CPU."""
    return {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # kernels start in Megatron's order: it overlaps TP and CP messages by it
        "NCCL_DEBUG": "WARN",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # generation, scoring and training alternate in size
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # models are directories; a node that waits for a hub it cannot reach hangs
        "PYTHONFAULTHANDLER": "1",
    }


@dataclass(kw_only=True)
class LocalConfig:
    """Ranks on this machine, alone or as one of several nodes: torchrun with c10d rendezvous."""

    nproc_per_node: int | None = None
    """Ranks on this machine (default: one a GPU, or one)."""
    nnodes: int = 1
    """Nodes that run this command, each with its --node-rank."""
    node_rank: int | None = None
    """Number of this node from 0 (default: SLURM_NODEID). Node 0 hosts the rendezvous."""
    master_addr: str | None = None
    """Name or address of node 0, as the other nodes reach it."""
    master_port: int = 29500
    """Port of the rendezvous on node 0."""
    local_addr: str | None = None
    """Name or address of this node, as the others reach it (default: SLURMD_NODENAME, or what torchrun finds)."""
    run_id: str = "taopd"
    """Name of the rendezvous; the same on all nodes, another for each attempt."""
    max_restarts: int = 0
    """Start the ranks anew so many times where one has failed; they go on from the last checkpoint."""
    run_again_file: str | None = None
    """Make this file, and end with status 0, where the ranks stopped as asked with a checkpoint (otherwise: status 75).
    For callers that do not get the status of every node, like srun's."""
    ranks: RanksConfig = field(default_factory=RanksConfig)

    def __post_init__(self) -> None:
        for name in ("nnodes", "nproc_per_node"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.max_restarts < 0:
            raise ConfigError(f"--max-restarts {self.max_restarts} must not be negative")
        if self.nnodes == 1:
            for name in ("master_addr", "node_rank", "local_addr"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"--{name.replace('_', '-')} {getattr(self, name)} has no effect with --nnodes 1; drop it"
                    )
        elif self.master_addr is None:
            raise ConfigError(f"--nnodes {self.nnodes} needs --master-addr: where the other nodes reach node 0")


def refuse_control_characters(flag: str, value: str) -> None:
    """Refuse what a line of a script cannot hold, whatever the quotes.

    Raises:
        ConfigError: there is a line break, a control character or a backslash.
    """
    if not value.isprintable() or "\\" in value:
        raise ConfigError(f"{flag} {value!r} must not have line breaks, control characters or backslashes")
