"""The table over seeds, from records alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from megatron_taopd.suite.intervals import CONFIDENCE, mean_interval, paired_interval
from megatron_taopd.suite.measured import MEASURES, TRAINING_MEASURES, description, is_measure
from megatron_taopd.suite.plan import HELD_OUT, Cell, Plan, Run
from megatron_taopd.suite.sweep import Look, choose, chosen_rates, undecided_cells

FORMAT = 1


def build_table(plan: Plan, look: Look) -> dict[str, Any]:
    """Everything that the files of a table show; docs/suite.md has the keys.

    Args:
        look: the record of a run, None where there is none.
    """
    suite = plan.suite
    chosen = chosen_rates(plan, look)
    rows = [_row(plan, cell, chosen, look) for cell in plan.cells]
    there = dict.fromkeys(name for row in rows for name in row["values"])
    order = list(MEASURES)
    names = sorted(there, key=lambda name: order.index(name.split("/")[0]))
    for row in rows:
        row["measures"] = {}
        for name in names:
            values = row["values"].get(name, {})
            row["measures"][name] = {"values": values, **mean_interval(list(values.values()))}
    for row, cell in zip(rows, plan.cells, strict=True):
        other = _baseline_row(rows, plan, cell)
        for name in names:
            versus = None
            if other is not None and other is not row:
                versus = paired_interval(row["values"].get(name, {}), other["values"].get(name, {}))
            row["measures"][name]["versus_baseline"] = versus
        row["baseline"] = None if other is None or other is row else [other["method"], other["budget"]]
    for row in rows:
        del row["values"]
    return {
        "format": FORMAT,
        "suite": suite.path,
        "made": round(time.time(), 1),
        "confidence": CONFIDENCE,
        "seeds": list(suite.seeds),
        "baseline": suite.baseline,
        "measures": {name: description(name) for name in names},
        "rows": rows,
        "sweep": _sweep(plan, look),
        "runs": _count(plan, chosen, look),
    }


def _row(plan: Plan, cell: Cell, chosen: Mapping[Cell, float | None], look: Look) -> dict[str, Any]:
    records = {}
    if cell in chosen:
        records = {seed: look(Run(cell, chosen[cell], seed)) for seed in plan.suite.seeds}
    finished = {
        seed: record
        for seed, record in records.items()
        if record and record["status"] == "finished" and HELD_OUT in record["measured"]
    }
    failed = [seed for seed, record in records.items() if record and record["status"] == "failed"]
    values: dict[str, dict[int, float]] = {}
    for seed, record in finished.items():
        for name, value in _values(record).items():
            if value is not None:
                values.setdefault(name, {})[seed] = value
    return {
        "method": cell.method.name,
        "budget": cell.budget,
        "lr": chosen.get(cell),
        "trains": cell.method.trains,
        "settings": cell.method.overrides,
        "seeds": list(finished),
        "failed": failed,
        "missing": [seed for seed in plan.suite.seeds if seed not in finished and seed not in failed],
        "values": values,
    }


def _values(record: dict[str, Any]) -> dict[str, float | None]:
    """The measures of a finished run, on the held-out set and of its training."""
    values = {name: value for name, value in record["measured"][HELD_OUT].items() if is_measure(name)}
    for name, key in TRAINING_MEASURES.items():
        values[name] = (record["training"] or {}).get(key)
    values["peak_memory"] = record["peak_memory_bytes"]
    return values


def _baseline_row(rows: list[dict[str, Any]], plan: Plan, cell: Cell) -> dict[str, Any] | None:
    """The baseline at the same budget, or its only row."""
    own = [row for row in rows if row["method"] == plan.suite.baseline]
    if len(own) > 1:
        own = [row for row in own if row["budget"] == cell.budget]
    return own[0] if own else None


def _sweep(plan: Plan, look: Look) -> dict[str, Any] | None:
    sweep = plan.suite.sweep
    if sweep is None:
        return None
    cells = []
    for cell in plan.cells:
        choice = choose(plan, cell, look) if cell.rates else None
        if choice is not None:
            named = {"method": cell.method.name, "budget": cell.budget, "chosen": choice.rate}
            cells.append({**named, "at_edge": choice.at_edge, "candidates": choice.candidates})
    return {"by": sweep.by, "seeds": list(sweep.seeds), "cells": cells}


def _count(plan: Plan, chosen: Mapping[Cell, float | None], look: Look) -> dict[str, int]:
    runs = dict.fromkeys([*plan.sweep_runs(), *plan.main_runs(chosen)])
    records = [look(run) for run in runs]
    ended = [record["status"] for record in records if record is not None]
    undecided = len(undecided_cells(plan, chosen, look)) * len(plan.seeds_of_undecided)
    return {
        "finished": ended.count("finished"),
        "failed": ended.count("failed"),
        "missing": len(records) - len(ended) + undecided,
    }
