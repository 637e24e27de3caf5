"""Choosing a learning rate: the best mean on the validation set over the sweep's seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_taopd.suite.measured import higher_is_better
from megatron_taopd.suite.plan import VALIDATION, Cell, Plan, Run

Look = Callable[[Run], "dict[str, Any] | None"]
"""The record of a run that ended, or None."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a sweep came to."""

    rate: float | None
    """None where every candidate failed."""
    candidates: list[dict[str, Any]]
    """``lr``, ``mean`` on the validation set (None after a failure), ``seeds`` and ``failed`` of each."""
    at_edge: bool
    """Whether it is the smallest or largest candidate, so that the best one may lie outside."""


def choose(plan: Plan, cell: Cell, look: Look) -> Choice | None:
    """The learning rate of a cell; None while runs of its sweep have not ended.

    A candidate with a run that failed, or whose measure is not finite, is not chosen. Equal means: the smaller rate.
    """
    sweep = plan.suite.sweep
    assert sweep is not None, "there is something to choose"
    candidates: list[dict[str, Any]] = []
    for rate in cell.rates:
        records = [look(Run(cell, rate, seed)) for seed in sweep.seeds]
        ended = [record for record in records if record is not None]
        if len(ended) < len(records):
            return None
        values = [_value(record, sweep.by) for record in ended]
        known = [value for value in values if value is not None]
        failed = len(values) - len(known)
        mean = math.fsum(known) / len(known) if not failed else None
        candidates.append({"lr": rate, "mean": mean, "seeds": len(values), "failed": failed})
    usable = [c for c in candidates if c["mean"] is not None]
    if not usable:
        return Choice(rate=None, candidates=candidates, at_edge=False)
    sign = -1 if higher_is_better(sweep.by) else 1
    best = min(usable, key=lambda c: (sign * c["mean"], c["lr"]))
    rates = cell.rates
    return Choice(
        rate=best["lr"],
        candidates=candidates,
        at_edge=len(rates) > 1 and best["lr"] in (rates[0], rates[-1]),
    )


def chosen_rates(plan: Plan, look: Look) -> dict[Cell, float | None]:
    """The learning rate of every cell for which it is known; None where the cell does not train."""
    chosen: dict[Cell, float | None] = {}
    for cell in plan.cells:
        if plan.suite.sweep is None or not cell.rates:
            chosen[cell] = cell.rates[0] if cell.rates else None
            continue
        choice = choose(plan, cell, look)
        if choice is not None and choice.rate is not None:
            chosen[cell] = choice.rate
    return chosen


def undecided_cells(plan: Plan, chosen: Mapping[Cell, float | None], look: Look) -> list[Cell]:
    """Cells whose learning rate is still to be found; not those of which every candidate failed."""
    return [cell for cell in plan.cells if cell not in chosen and choose(plan, cell, look) is None]


def _value(record: dict[str, Any], measure: str) -> float | None:
    if record["status"] != "finished":
        return None
    return record["measured"][VALIDATION][measure]
