"""What every sub-command does first and last."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from megatron_taopd.commands.run_record import record_start, record_warnings
from megatron_taopd.config_file import flat_values
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig


@contextmanager
def ranks(parallel: ParallelConfig, *, seed: int) -> Iterator[None]:
    """Process groups and model-parallel state for the time of a command.

    Raises:
        ConfigError: the layout does not fit the ranks.
    """
    distributed.initialize(parallel, seed=seed)
    try:
        configure_logging()
        yield
    finally:
        distributed.shutdown()


def configure_logging() -> None:
    """Notes of this package on standard output of rank 0; warnings of the others on standard error."""
    root = logging.getLogger("megatron_taopd")
    for handler in list(root.handlers):
        root.removeHandler(handler)
    first = distributed.rank() == 0
    handler = logging.StreamHandler(sys.stdout if first else sys.stderr)
    handler.setFormatter(logging.Formatter("> %(message)s" if first else f"> rank {distributed.rank()}: %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO if first else logging.ERROR)
    root.propagate = False


def announce(config: Any, title: str, save_to: str | None = None) -> dict[str, Any]:
    """Print the resolved configuration on rank 0; returns it flat.

    Args:
        save_to: where to write it as YAML that ``--config`` reads, with the versions in use, and from now on warnings.
    """
    values = flat_values(config)
    if distributed.rank() == 0:
        text = yaml.safe_dump(values, sort_keys=False)
        print(f"------------------------ {title} ------------------------")
        width = max(map(len, values))
        for name, value in values.items():
            print(f"  {name} {'.' * (width + 3 - len(name))} {value}")
        print("-" * (50 + len(title)), flush=True)
        if save_to is not None:
            Path(save_to).mkdir(parents=True, exist_ok=True)
            (Path(save_to) / "config.yaml").write_text(text, encoding="utf-8")
            record_start(save_to)
            record_warnings(save_to)
    return values


def last_rank_progress() -> Callable[[int, int], None] | None:
    """Shows micro-batches done of all on a terminal, from the one rank that sees them finished; None on the others."""
    return _show_progress if distributed.rank() == distributed.world_size() - 1 else None


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r> scored {done}/{total} micro-batches", end="" if done < total else "\n", file=sys.stderr)
