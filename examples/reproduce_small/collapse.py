"""Rows that ended above the untrained student, and the suite that repeats them at a smaller learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

START, MEASURE = "start", "kl_forward"
SMALLER = 3.0
"""The smallest learning rate of the sweep is divided by it."""


@dataclass(frozen=True)
class Collapsed:
    """A method at a budget (None: every position)."""

    method: str
    budget: float | None
    why: str


def collapsed_rows(table: dict[str, Any]) -> list[Collapsed]:
    """Rows whose mean held-out divergence is above that of the untrained student of the same seeds, or not finite.

    A row that has runs to be made is not judged yet; nor is any before the untrained student is measured.

    Args:
        table: of ``table.json``.

    Raises:
        ValueError: it has no row of the untrained student.
    """
    start = next((row for row in table["rows"] if row["method"] == START), None)
    if start is None:
        raise ValueError(f"the table has no row '{START}', the untrained student that others are compared with")
    if start["missing"] or start["failed"]:
        return []
    before = start["measures"][MEASURE]["values"]
    all_failed = {(c["method"], c["budget"]) for c in (table["sweep"] or {"cells": []})["cells"] if c["chosen"] is None}
    found = []
    for row in table["rows"]:
        key = row["method"], row["budget"]
        if not row["trains"]:
            continue
        if key in all_failed:
            found.append(Collapsed(*key, "no run of its sweep was finite at any learning rate"))
            continue
        if row["missing"]:
            continue
        values = row["measures"][MEASURE]["values"]
        lost = [seed for seed in before if seed not in values]
        if lost:
            found.append(Collapsed(*key, f"failed or not finite with the seeds {', '.join(lost)}"))
        elif fmean(values.values()) > fmean(before[seed] for seed in values):
            found.append(
                Collapsed(*key, f"{fmean(values.values()):.4f} nats, and {fmean(before.values()):.4f} untrained")
            )
    return found


def suite_of(suite: dict[str, Any], rows: Sequence[Collapsed]) -> dict[str, Any]:
    """A suite file of these methods and budgets, at one rate: a third of the smallest that was tried; all seeds.

    The untrained student is in it for comparison.

    Args:
        suite: content of the file that they collapsed in, with one list of rates for all methods.
    """
    methods: dict[str, Any] = {START: suite["methods"][START]}
    for row in rows:
        given = suite["methods"][row.method] or {}
        own = methods.setdefault(row.method, {key: value for key, value in given.items() if key != "budgets"})
        if row.budget is not None:
            own["budgets"] = [*own.get("budgets", []), row.budget]
    return {
        "settings": suite["settings"],
        "methods": methods,
        "seeds": suite["seeds"],
        "lr": float(f"{min(map(float, suite['lr'])) / SMALLER:.3g}"),
        "held_out": suite["held_out"],
    }
