"""How the runs of a suite stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_taopd.suite.claims import is_claimed
from megatron_taopd.suite.plan import Plan, Run
from megatron_taopd.suite.records import BEGUN, read_record
from megatron_taopd.suite.sweep import chosen_rates, undecided_cells


def run_states(plan: Plan) -> Iterator[tuple[str, str]]:
    """Directory below ``runs`` and state of each run; runs whose learning rate is not chosen yet have lr-? in it.

    States: ``finished``, ``failed``, ``running`` (in some living process), ``begun`` (interrupted), ``to do``.
    """

    def state(run: Run) -> str:
        directory = plan.directory(run)
        record = read_record(directory)
        if record is not None:
            return str(record["status"])
        if not directory.is_dir():
            return "to do"
        return "running" if is_claimed(directory) else "begun" if (directory / BEGUN).is_file() else "to do"

    def look(run: Run) -> dict[str, Any] | None:
        return read_record(plan.directory(run))

    chosen = chosen_rates(plan, look)
    for run in dict.fromkeys([*plan.sweep_runs(), *plan.main_runs(chosen)]):
        yield run.id, state(run)
    for seed in plan.seeds_of_undecided:
        for cell in undecided_cells(plan, chosen, look):
            yield Run(cell, None, seed).id.replace(f"/seed-{seed}", f"/lr-?/seed-{seed}"), "to do"
