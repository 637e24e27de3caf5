"""``taopd launch local``: torchrun on this machine, alone or as one node of several."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_taopd.errors import ConfigError
from megatron_taopd.exit_status import FINISHED, RUN_AGAIN
from megatron_taopd.launch import command as commands
from megatron_taopd.launch import run_again
from megatron_taopd.launch.config import LocalConfig

JOIN_TIMEOUT = 1800
"""Seconds that a node waits for the others; containers are slow to start on many nodes at once."""


def launch(config: LocalConfig, words: Sequence[str]) -> int:
    """Run the ranks of this node until they end; returns their exit status (:mod:`megatron_taopd.exit_status`)."""
    nproc_per_node = config.nproc_per_node or _num_gpus() or 1
    command = commands.check(
        words,
        world_size=config.nnodes * nproc_per_node,
        starts_again=config.max_restarts > 0,
        models=config.ranks.dry_run,  # otherwise the ranks do it, and this process had better stay small
    )
    arguments = torchrun_words(config, nproc_per_node, command.words)
    changes = config.ranks.changes(os.environ, threads=1)
    for note in command.notes:
        _say(note)
    line = shlex.join([*(f"{name}={value}" for name, value in changes.items()), "torchrun", *arguments])
    _say(f"node {_node_rank(config)} of {config.nnodes}: {line}")
    if config.ranks.dry_run:
        return FINISHED
    os.environ.update(changes)

    from megatron_taopd.torchrun import main

    with tempfile.TemporaryDirectory() as own:
        stopped = Path(config.run_again_file or Path(own, "run-again"))
        os.environ[run_again.VARIABLE] = str(stopped.absolute())
        status = main(arguments)
        if status == RUN_AGAIN:  # told to stop before they could do anything
            stopped.touch()
            status = FINISHED
        return RUN_AGAIN if status == FINISHED and config.run_again_file is None and stopped.exists() else status


def torchrun_words(config: LocalConfig, nproc_per_node: int, words: Sequence[str]) -> list[str]:
    """What torchrun is told."""
    arguments = ["--nnodes", str(config.nnodes), "--nproc-per-node", str(nproc_per_node)]
    if config.nnodes == 1:
        arguments += ["--standalone", "--local-addr", "127.0.0.1"]
    else:
        rank = _node_rank(config)
        # Said outright: torchrun would compare names, and a node's name for itself need not be the network's.
        conf = f"is_host={int(rank == 0)},join_timeout={JOIN_TIMEOUT}"
        arguments += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{config.master_addr}:{config.master_port}"]
        arguments += ["--rdzv-id", config.run_id, "--rdzv-conf", conf]
        address = config.local_addr or os.environ.get("SLURMD_NODENAME")
        if address is not None:
            arguments += ["--local-addr", address]
    return [*arguments, "--max-restarts", str(config.max_restarts), "-m", "megatron_taopd", *words]


def _node_rank(config: LocalConfig) -> int:
    if config.nnodes == 1:
        return 0
    if config.node_rank is None and "SLURM_NODEID" not in os.environ:
        raise ConfigError(f"--nnodes {config.nnodes} needs --node-rank, the number of this node from 0")
    rank = int(os.environ["SLURM_NODEID"]) if config.node_rank is None else config.node_rank
    if not 0 <= rank < config.nnodes:
        raise ConfigError(f"--node-rank {rank} must be from 0 to {config.nnodes - 1}, with --nnodes {config.nnodes}")
    return rank


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _say(text: str) -> None:
    print(f"> {text}", file=sys.stderr, flush=True)
