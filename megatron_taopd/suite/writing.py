"""A table as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from megatron_taopd.suite.measured import ACCURACY
from megatron_taopd.suite.records import write_json, write_text

SELECTED = ("train_C_q05", "train_low_C_share", "keep_ratio")
COSTS = ("tokens_supervised", "wall_time", "peak_memory")
SHARES = ("train_low_C_share", "keep_ratio")
"""Shown in per cent, as accuracies are."""
SCALES = {
    "peak_memory": (2.0**-30, 2),
    "wall_time": (1.0, 1),
    "tokens_supervised": (1.0, 0),
    **dict.fromkeys(SHARES, (100.0, 2)),
}
"""Factor and digits of what Markdown shows."""
UNKNOWN = "–"


def write_table(table: dict[str, Any], directory: str | Path, name: str = "table") -> list[Path]:
    """Write ``NAME.md``, ``NAME.csv`` and ``NAME.json``; returns their paths."""
    markdown, comma_separated, json = (Path(directory) / f"{name}.{kind}" for kind in ("md", "csv", "json"))
    write_json(json, table)
    write_text(comma_separated, as_csv(table))
    write_text(markdown, as_markdown(table))
    return [markdown, comma_separated, json]


def as_csv(table: dict[str, Any]) -> str:
    """A line a row of the table; of each measure mean, half width, and the paired difference with its half width."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = list(table["measures"])
    parts = ("", "_half_width", "_minus_baseline", "_minus_baseline_half_width")
    writer.writerow(["method", "budget", "lr", "n", "failed", "missing", *(n + part for n in names for part in parts)])
    for row in table["rows"]:
        line: list[Any] = [row["method"], row["budget"], row["lr"], len(row["seeds"])]
        line += [len(row["failed"]), len(row["missing"])]
        for name in names:
            measure = row["measures"][name]
            versus = measure["versus_baseline"] or {"mean": None, "half_width": None}
            line += [measure["mean"], measure["half_width"], versus["mean"], versus["half_width"]]
        writer.writerow(["" if value is None else value for value in line])
    return buffer.getvalue()


def as_markdown(table: dict[str, Any]) -> str:
    """The table for people, with what it cannot show below."""
    baseline = table["baseline"]
    tasks = [name for name in table["measures"] if name.startswith(f"{ACCURACY}/")]
    quality = ["kl_forward", ACCURACY, *(tasks if len(tasks) > 1 else [])]
    names = [name for name in (*quality, *SELECTED, *COSTS) if name in table["measures"]]
    compared = quality if baseline is not None else []
    head = ["method", "budget", "lr", "seeds"]
    for name in names:
        head.append(_title(name, table["measures"][name]))
        if name in compared:
            head.append(f"minus {baseline}")
    lines = [_line(head), _line(["---"] * len(head))]
    for row in table["rows"]:
        budget = "" if row["budget"] is None else f"{100 * row['budget']:g} %"
        cells = [row["method"], budget, "" if row["lr"] is None else f"{row['lr']:g}", str(len(row["seeds"]))]
        for name in names:
            measure = row["measures"][name]
            cells.append(_interval(name, measure))
            if name in compared:
                cells.append(_interval(name, measure["versus_baseline"], sign="+"))
        lines.append(_line(cells))
    return "\n".join([*lines, "", *_notes(table)]) + "\n"


def _notes(table: dict[str, Any]) -> list[str]:
    percent = f"{100 * table['confidence']:g} %"
    notes = [
        f"Mean ± half width of the {percent} t-interval over seeds, measured on the held-out set. Differences are "
        "paired: the same seeds of both rows. The intervals are of one comparison each, not corrected for their number."
    ]
    runs = table["runs"]
    if runs["failed"] or runs["missing"]:
        notes.append(f"{runs['finished']} runs finished, {runs['failed']} failed, {runs['missing']} are not made yet.")
    for row in table["rows"]:
        if row["failed"]:
            notes.append(f"{_name(row)}: failed with the seeds {', '.join(map(str, row['failed']))}.")
    cells = [] if table["sweep"] is None else table["sweep"]["cells"]
    for cell in cells:
        if cell["chosen"] is None:
            notes.append(f"{_name(cell)}: no learning rate of the sweep finished; there is nothing to report.")
            continue
        lost = [f"{c['lr']:g} ({c['failed']} of {c['seeds']} seeds)" for c in cell["candidates"] if c["failed"]]
        if lost:
            rates = ", ".join(lost)
            notes.append(
                f"{_name(cell)}: learning rates of the sweep with runs that failed or were not finite: {rates}."
            )
    at_edge = [f"{_name(cell)} ({cell['chosen']:g})" for cell in cells if cell["at_edge"]]
    if at_edge:
        notes.append(
            "The best learning rate is the first or last of those tried, so that a better one may lie beyond: "
            f"{', '.join(at_edge)}."
        )
    return [line for note in notes for line in (note, "")][:-1]


def _name(cell: dict[str, Any]) -> str:
    return cell["method"] if cell["budget"] is None else f"{cell['method']} at {100 * cell['budget']:g} %"


def _title(name: str, measure: dict[str, Any]) -> str:
    percent = name.startswith(ACCURACY) or name in SHARES
    unit = "%" if percent else {"bytes": "GiB", "share": ""}.get(measure["unit"], measure["unit"])
    return f"{measure['title']} ({unit})" if unit not in ("tokens", "") else measure["title"]


def _interval(name: str, measure: dict[str, Any] | None, *, sign: str = "") -> str:
    if measure is None or measure["mean"] is None:
        return UNKNOWN
    scale, digits = SCALES.get(name, (100.0, 1) if name.startswith(ACCURACY) else (1.0, 4))
    text = f"{scale * measure['mean']:{sign}.{digits}f}"
    if measure["half_width"] is not None:
        text += f" ± {scale * measure['half_width']:.{digits}f}"
    return text


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
