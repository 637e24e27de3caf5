"""``taopd diagnose bank | gain | report``."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from typing import Any

from megatron_taopd.cli import parse
from megatron_taopd.commands.common import announce, configure_logging, last_rank_progress, ranks
from megatron_taopd.diagnostics.config import BankConfig, GainConfig, ReportConfig
from megatron_taopd.errors import ConfigError


def diagnose(words: Sequence[str]) -> int:
    """Dispatch to one of :data:`ACTIONS`; returns the exit status."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name = words[0]
    if name not in ACTIONS:
        near = difflib.get_close_matches(name, ACTIONS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown diagnostic {name!r}{hint} Available: {', '.join(ACTIONS)}")
    config_type, action, _ = ACTIONS[name]
    action(parse(config_type, list(words[1:]), name=f"diagnose {name}"))
    return 0


def usage() -> str:
    """The text of ``taopd diagnose --help``."""
    width = max(map(len, ACTIONS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, _, summary) in ACTIONS.items()]
    return "\n".join(
        [
            "usage: taopd diagnose ACTION [--config FILE.yaml] [--flags ...]",
            "       torchrun --nproc-per-node N -m megatron_taopd diagnose bank|gain ...",
            "",
            *lines,
            "",
            "taopd diagnose ACTION --help explains every flag.",
        ]
    )


def bank(config: BankConfig) -> None:
    """Freeze a bank."""
    with ranks(config.parallel, seed=0):
        from megatron_taopd.diagnostics.making import make_bank

        announce(config, "taopd diagnose bank")
        made = make_bank(config, progress=last_rank_progress())
        if made is not None:
            size = f"{made.num_positions} positions of {made.num_responses} responses to {made.num_prompts} prompts"
            print(f"> bank {made.id}: {size}: {config.output}", flush=True)


def gain(config: GainConfig) -> None:
    """Measure a checkpoint's gain on a bank."""
    with ranks(config.parallel, seed=0):
        from megatron_taopd.diagnostics.measuring import measure_gain

        announce(config, "taopd diagnose gain")
        measured = measure_gain(config, progress=last_rank_progress())
        if measured is not None:
            columns = measured.columns
            before, after = (columns[f"kl_forward_{when}"].astype(float).mean() for when in ("before", "after"))
            print(f"> KL to the teacher {before:.4f} -> {after:.4f} nats a position: {config.output}", flush=True)


def report(config: ReportConfig) -> None:
    """Write the report of one or more gains."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ConfigError(
            f"taopd diagnose report works in one process and {world_size} were started; run it without torchrun or srun"
        )
    from megatron_taopd.diagnostics.report import write_report

    configure_logging()
    announce(config, "taopd diagnose report")
    written = write_report(config)
    for checkpoint in written["checkpoints"]:
        found = checkpoint["gain"]
        low, high = found["interval"]
        print(f"> {checkpoint['name']}: mean gain {found['mean']:.4f} [{low:.4f}, {high:.4f}] nats a position")
    print(f"> report.json, report.md and {len(written['plots'])} plots: {config.output}", flush=True)


ACTIONS: dict[str, tuple[type, Callable[[Any], None], str]] = {
    "bank": (BankConfig, bank, "freeze contexts that the student visited, with what both models say"),
    "gain": (GainConfig, gain, "score them again with a checkpoint: where did the gap close?"),
    "report": (ReportConfig, report, "tables, regressions, intervals and plots of one or more gains"),
}
