"""The plot of all regimes: what every row reached, and how far that is from full distillation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASURES = ("kl_forward", "accuracy")
COLOURS = {None: "black", 0.05: "tab:orange", 0.1: "tab:blue"}


def plot(suites: dict[str, Path], out: Path) -> None:
    """Of every row of the suites' tables the held-out divergence and accuracy, with the seeds as dots; beside each the
    differences from the baseline, paired by seed, with their interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    tables = {
        regime: json.loads((suite / "table.json").read_text(encoding="utf-8")) for regime, suite in suites.items()
    }
    heights = [0.9 + 0.17 * len(_entries(table)) for table in tables.values()]
    figure, axes = plt.subplots(
        len(tables), 4, figsize=(13, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for row, (regime, table) in zip(axes, tables.items(), strict=True):
        for index, name in enumerate(MEASURES):
            _draw(row[2 * index], table, name, differences=False)
            _draw(row[2 * index + 1], table, name, differences=True)
        row[0].set_xscale("log")
        row[0].xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        row[0].xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        row[0].xaxis.set_minor_formatter(ticker.NullFormatter())
        row[0].set_ylabel(regime)
        labels = [e["method"] + (f" {100 * e['budget']:g} %" if e["budget"] else "") for e in _entries(table)]
        row[0].set_yticks(range(len(labels)), labels, fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    print(out)


def _entries(table: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in table["rows"] if entry["seeds"]]


def _draw(axis: Any, table: dict[str, Any], name: str, *, differences: bool) -> None:
    entries = _entries(table)
    baseline = next((e["measures"][name]["values"] for e in entries if e["method"] == table["baseline"]), {})
    for place, entry in enumerate(entries):
        measure = entry["measures"][name]
        values, shown = measure["values"], measure
        if differences:
            values = {seed: value - baseline[seed] for seed, value in values.items() if seed in baseline}
            shown = measure["versus_baseline"]
        if shown is None or shown["mean"] is None:
            continue  # the baseline itself, or nothing to compare
        color = COLOURS.get(entry["budget"], "tab:green")
        axis.plot(list(values.values()), [place] * len(values), ".", color=color, alpha=0.4, markeredgewidth=0)
        axis.errorbar(shown["mean"], place, xerr=shown["half_width"] or 0.0, fmt="|", color=color, ms=9, capsize=2)
    title = table["measures"][name]["title"]
    if differences:
        axis.axvline(0.0, color="gray", linewidth=0.8)
        title = f"{title} minus that of {table['baseline']}"
    axis.set_yticks(range(len(entries)), [""] * len(entries))
    axis.set_ylim(len(entries) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    axis.tick_params(axis="x", labelsize=7, which="both")
    axis.set_title(f"held-out {title}", fontsize=8)
