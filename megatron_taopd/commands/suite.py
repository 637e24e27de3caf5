"""``taopd suite run | table | list``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_taopd.cli import parse
from megatron_taopd.errors import ConfigError
from megatron_taopd.exit_status import FAILED, FINISHED, RUN_AGAIN

SUITE_COPY = "suite.yaml"
"""The suite file as the last start had it; with the records, all that a table needs."""


@dataclass(kw_only=True)
class SuiteRunConfig:
    """Make the runs of a suite that are not finished, and its table."""

    suite: str
    """Suite file (YAML): methods, budgets, seeds, settings and what is measured; docs/suite.md."""
    out: str
    """Directory of the suite. Several processes may be started with the same one; they share the runs."""
    retry_failed: bool = False
    """Make failed runs again (default: they stay failed)."""


@dataclass(kw_only=True)
class SuiteTableConfig:
    """Table of a suite's finished runs, from their records alone."""

    out: str
    """Directory of the suite."""
    baseline: str | None = None
    """Method that the differences are from, in the place of the suite file's, each row's at its own budget; written
    beside the table as table-versus-METHOD.*."""


@dataclass(kw_only=True)
class SuiteListConfig:
    """The runs of a suite, and how each stands; nothing is made."""

    suite: str
    """Suite file (YAML)."""
    out: str
    """Directory of the suite, there or not."""


def suite(words: Sequence[str]) -> int:
    """Dispatch to one of :data:`ACTIONS`; returns the exit status."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name = words[0]
    if name not in ACTIONS:
        near = difflib.get_close_matches(name, ACTIONS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"unknown suite action {name!r}{hint} Available: {', '.join(ACTIONS)}")
    config_type, action, _ = ACTIONS[name]
    return action(parse(config_type, list(words[1:]), name=f"suite {name}"))


def usage() -> str:
    """The text of ``taopd suite --help``."""
    width = max(map(len, ACTIONS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, _, summary) in ACTIONS.items()]
    return "\n".join(["usage: taopd suite ACTION [--config FILE.yaml] [--flags ...]", "", *lines])


def run_suite(config: SuiteRunConfig) -> int:
    """Make the runs; returns the exit status."""
    from megatron_taopd.platform import distributed
    from megatron_taopd.suite.config import read_suite
    from megatron_taopd.suite.intervals import t_quantile
    from megatron_taopd.suite.plan import Plan
    from megatron_taopd.suite.records import write_text
    from megatron_taopd.suite.runner import Runner, start_ranks

    checked = read_suite(config.suite)
    t_quantile(1)  # the table needs it, so that it had better be here before the first run
    plan = Plan(checked, config.out)
    plan.check()
    start_ranks()
    try:
        for cell in plan.cells:
            distributed.check_world_size(plan.cell_config(cell).parallel)
        plan.load_tasks()
        if distributed.rank() == 0:
            write_text(Path(config.out) / SUITE_COPY, checked.text)
        runner = Runner(plan, retry_failed=config.retry_failed)
        if not runner.go():
            return RUN_AGAIN
        if distributed.rank() == 0:
            show_table(plan, runner.records.look)
        return FAILED if runner.failed else FINISHED
    finally:
        distributed.shutdown()


def show_table(plan: Any, look: Any, *, name: str = "table") -> None:
    """Write the table's files, of this name, and print it."""
    from megatron_taopd.suite.table import build_table
    from megatron_taopd.suite.writing import as_markdown, write_table

    table = build_table(plan, look)
    paths = write_table(table, plan.out, name)
    print(as_markdown(table))
    print(f"> {', '.join(map(str, paths))}", flush=True)


def table_of(config: SuiteTableConfig) -> int:
    """Rebuild the table."""
    from megatron_taopd.suite.config import read_suite
    from megatron_taopd.suite.plan import Plan
    from megatron_taopd.suite.records import read_record

    path = Path(config.out) / SUITE_COPY
    if not path.is_file():
        raise ConfigError(f"--out {config.out} has no {SUITE_COPY}; it is no directory of taopd suite run")
    suite, name = read_suite(path), "table"
    if config.baseline is not None:
        suite, name = suite.with_baseline(config.baseline), f"table-versus-{config.baseline}"
    plan = Plan(suite, config.out)
    show_table(plan, lambda run: read_record(plan.directory(run)), name=name)
    return 0


def list_runs(config: SuiteListConfig) -> int:
    """Print a line a run and their number."""
    from megatron_taopd.suite.config import read_suite
    from megatron_taopd.suite.plan import Plan
    from megatron_taopd.suite.states import run_states

    plan = Plan(read_suite(config.suite), config.out)
    states = list(run_states(plan))
    for name, state in states:
        print(f"{state:<9} {name}")
    counts = {state: sum(1 for _, other in states if other == state) for state in dict.fromkeys(s for _, s in states)}
    print(f"> {len(states)} runs: {', '.join(f'{count} {state}' for state, count in counts.items())}", flush=True)
    return FINISHED


ACTIONS: dict[str, tuple[type, Callable[[Any], int], str]] = {
    "run": (SuiteRunConfig, run_suite, "make the runs that are not finished, then the table"),
    "list": (SuiteListConfig, list_runs, "the runs of a suite and how each stands"),
    "table": (SuiteTableConfig, table_of, "the table of the runs that are finished, from their records"),
}
