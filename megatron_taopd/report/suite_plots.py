"""Plots of a suite: every measure by method and budget, with the seeds behind it, and curves of the runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_taopd.report.forest import Estimate, finite, forest
from megatron_taopd.report.plots import SERIES_COLOURS, Axis, Colour, Format, Line, Mark, Plot, Rule
from megatron_taopd.report.scales import number, share
from megatron_taopd.report.series import thin
from megatron_taopd.report.suite_directory import SuiteDirectory

UNITS: dict[str, tuple[float, str, Format]] = {
    "bytes": (2.0**-30, "GiB", "number"),
    "s": (1.0, "seconds", "number"),
    "share": (1.0, "", "percent"),
    "tokens": (1.0, "tokens", "number"),
}
"""Of a measure's unit: the factor, the unit it gives, and how its numbers are written."""


def unit_of(measure: Mapping[str, Any]) -> tuple[float, str, Format]:
    """Factor, unit and number format of a measure of the table."""
    return UNITS.get(measure["unit"], (1.0, str(measure["unit"]), "number"))


def safe(name: str) -> str:
    """A name as it can stand in a plot's key."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in name)


def estimate(measured: Mapping[str, Any] | None, factor: float) -> Estimate:
    """Mean and interval of a measure of a row."""
    if measured is None or measured["mean"] is None:
        return None, None
    mean, half = measured["mean"] * factor, measured["half_width"]
    return mean, None if half is None else (mean - half * factor, mean + half * factor)


def measure_plots(suite: SuiteDirectory, name: str, *, compare: bool) -> list[Plot]:
    """A measure: against the budget, and at every budget with its seeds; with ``compare`` minus the baseline, too."""
    plots: list[Plot | None] = [_against_budget(suite, name)] if len(suite.budgets) > 1 else []
    for budget in suite.budgets_or_none:
        plots.append(_at_budget(suite, name, budget))
        if compare and suite.table["baseline"] is not None:
            plots.append(_differences(suite, name, budget))
    return [plot for plot in plots if plot is not None]


def colour_of(suite: SuiteDirectory, method: str) -> tuple[Colour, bool]:
    """Colour of a method's lines, and whether they are dashed: the same in every plot."""
    index = suite.methods.index(method)
    return SERIES_COLOURS[index % len(SERIES_COLOURS)], index >= len(SERIES_COLOURS)


def _words(measure: Mapping[str, Any]) -> str:
    _, unit, _ = unit_of(measure)
    better = f"{measure['better']} is better" if measure["better"] else ""
    return ", ".join(filter(None, [unit, better]))


def _at(budget: float | None) -> str:
    return "" if budget is None else f" at {share(budget)}"


def _at_budget(suite: SuiteDirectory, name: str, budget: float | None) -> Plot | None:
    measure = suite.table["measures"][name]
    factor, _, kind = unit_of(measure)
    known = [row for row in suite.rows_at(budget) if row["measures"][name]["mean"] is not None]
    rows = [row for row in known if row["trains"]]
    if not rows:
        return None
    beside = [
        f"{row['method']} {number(row['measures'][name]['mean'] * factor, kind)}" for row in known if not row["trains"]
    ]
    baseline = [row for row in rows if row["method"] == suite.table["baseline"]]
    rule = (f"{baseline[0]['method']}, mean", baseline[0]["measures"][name]["mean"] * factor) if baseline else None
    return forest(
        key=f"suite-{safe(name)}-{safe(f'{budget:g}') if budget is not None else 'all'}",
        title=f"{title_of(measure)}{_at(budget)}",
        unit=_words(measure),
        names=[row["method"] for row in rows],
        groups={"": [estimate(row["measures"][name], factor) for row in rows]},
        rule=rule,
        singles=[[v * factor for v in row["measures"][name]["values"].values()] for row in rows],
        format=kind,
        note=f"Without training: {', '.join(beside)}." if beside else "",
    )


def _differences(suite: SuiteDirectory, name: str, budget: float | None) -> Plot | None:
    measure = suite.table["measures"][name]
    factor, unit, kind = unit_of(measure)
    rows = [
        row
        for row in suite.rows_at(budget)
        if row["trains"] and (row["measures"][name]["versus_baseline"] or {}).get("n")
    ]
    if not rows:
        return None
    return forest(
        key=f"suite-{safe(name)}-{safe(f'{budget:g}') if budget is not None else 'all'}-difference",
        title=f"{title_of(measure)}{_at(budget)}: minus {suite.table['baseline']}",
        unit=f"{'percentage points' if kind == 'percent' else unit} over the same seeds, {measure['better']} is better",
        names=[row["method"] for row in rows],
        groups={"": [estimate(row["measures"][name]["versus_baseline"], factor) for row in rows]},
        format=kind,
    )


def _against_budget(suite: SuiteDirectory, name: str) -> Plot:
    measure = suite.table["measures"][name]
    factor, _, kind = unit_of(measure)
    marks: list[Mark] = []
    for row in suite.rows:
        if row["budget"] is None and row["trains"] and row["measures"][name]["mean"] is not None:
            marks.append(Rule(name=row["method"], value=row["measures"][name]["mean"] * factor, axis="y"))
    methods = list(dict.fromkeys(row["method"] for row in suite.rows if row["budget"] is not None))
    for method in methods:
        own = sorted((row for row in suite.rows if row["method"] == method), key=lambda row: row["budget"])
        colour, dashed = colour_of(suite, method)
        marks.append(
            Line(
                name=method,
                x=[row["budget"] for row in own],
                y=[finite(estimate(row["measures"][name], factor)[0]) for row in own],
                colour=colour,
                dashed=dashed,
                markers=True,
            )
        )
    return Plot(
        key=f"suite-{safe(name)}-budgets",
        title=f"{title_of(measure)} against the budget",
        x=Axis(label="budget", scale="log", format="percent"),
        y=Axis(label=_words(measure), format=kind),
        marks=marks,
        note="Means over seeds; the intervals are in the plots of each budget.",
        summary=f"{title_of(measure)} of {len(methods)} methods at {len(suite.budgets)} budgets, as in the table.",
    )


def title_of(measure: Mapping[str, Any]) -> str:
    title = str(measure["title"])
    return title[:1].upper() + title[1:]


def curve_plots(suite: SuiteDirectory, metric: str, title: str, unit: str) -> list[Plot]:
    """A metric of the runs over iterations, a plot a budget, each line the mean over seeds."""
    plots = []
    for budget in suite.budgets_or_none:
        lines: list[Mark] = []
        for row in suite.rows_at(budget):
            line = _mean_curve(suite, row, metric)
            if line is not None:
                lines.append(line)
        if lines:
            plots.append(
                Plot(
                    key=f"suite-curve-{safe(metric)}-{safe(f'{budget:g}') if budget is not None else 'all'}",
                    title=f"{title}{_at(budget)}",
                    x=Axis(label="iteration", format="integer"),
                    y=Axis(label=unit, low=0),
                    marks=lines,
                    note="Means over seeds.",
                    summary=f"{title} over iterations of {len(lines)} methods.",
                )
            )
    return plots


def _mean_curve(suite: SuiteDirectory, row: dict[str, Any], metric: str) -> Line | None:
    series = [(run.iterations, run.series(metric)) for run in suite.runs_of(row)]
    length = min((len(x) for x, _ in series), default=0)
    if not length or all(math.isnan(v) for _, y in series for v in y):
        return None
    mean = np.mean([y[:length] for _, y in series], axis=0)
    thinned = thin(series[0][0][:length], mean.tolist())
    colour, dashed = colour_of(suite, row["method"])
    return Line(
        name=row["method"],
        x=thinned.x,
        y=thinned.y,
        colour=colour,
        dashed=dashed,
        markers=length <= 30,
    )


def sweep_plots(suite: SuiteDirectory, sweep: Mapping[str, Any]) -> list[Plot]:
    """What each learning rate came to on the validation set, a plot a budget."""
    plots = []
    by_budget: dict[float | None, list[Mapping[str, Any]]] = {}
    for cell in sweep["cells"]:
        by_budget.setdefault(cell["budget"], []).append(cell)
    for budget, cells in by_budget.items():
        lines: list[Mark] = []
        for cell in cells:
            colour, dashed = colour_of(suite, cell["method"])
            lines.append(
                Line(
                    name=cell["method"],
                    x=[candidate["lr"] for candidate in cell["candidates"]],
                    y=[finite(candidate["mean"]) for candidate in cell["candidates"]],
                    colour=colour,
                    dashed=dashed,
                    markers=True,
                )
            )
        chosen: Sequence[str] = [f"{cell['method']} {number(cell['chosen'])}" for cell in cells]
        plots.append(
            Plot(
                key=f"suite-sweep-{safe(f'{budget:g}') if budget is not None else 'all'}",
                title=f"Learning rates tried{_at(budget)}",
                x=Axis(label="learning rate", scale="log"),
                y=Axis(label=f"{sweep['by']} on the validation set"),
                marks=lines,
                summary=f"Chosen: {', '.join(chosen)}.",
            )
        )
    return plots
