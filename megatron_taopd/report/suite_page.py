"""The page of a suite."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from megatron_taopd import __version__
from megatron_taopd.report.blocks import Block, Fact, Facts, Notices, Page, Plots, Prose, Section, Source, Table
from megatron_taopd.report.checks import Notice
from megatron_taopd.report.scales import number, share
from megatron_taopd.report.suite_directory import SuiteDirectory
from megatron_taopd.report.suite_plots import curve_plots, measure_plots, sweep_plots, title_of, unit_of

COSTS = ("tokens_supervised", "keep_ratio", "wall_time", "peak_memory")


def suite_page(suite: SuiteDirectory, *, title: str | None = None, made_with: str) -> Page:
    """Put the page of a suite together."""
    table = suite.table
    shown = [name for name in table["measures"] if not _is_the_only_task(name, table["measures"])]
    qualities = [n for n in shown if table["measures"][n]["better"] is not None and n not in COSTS]
    costs = [n for n in COSTS if n in table["measures"]]
    others = [n for n in shown if n not in (*qualities, *costs)]
    made = datetime.datetime.fromtimestamp(table["made"], datetime.timezone.utc)
    sections = [
        _overview(suite),
        *_measures(suite, "results", "Results", qualities, _RESULTS.format(share(table["confidence"]))),
        _table(suite),
        *_curves(suite),
        *_measures(suite, "cost", "Cost", costs, ""),
        *_measures(suite, "contexts", "Contexts", others, "What the held-out and the training contexts are like."),
        *_sweep(suite),
        _settings(suite),
    ]
    return Page(
        kind="Report of a suite of runs",
        title=title or suite.path.resolve().name,
        subtitle=f"{len({row['method'] for row in suite.rows})} methods · {len(table['seeds'])} seeds · table of "
        f"{made:%Y-%m-%d %H:%M} UTC",
        sections=sections,
        made_with=made_with,
    )


def _is_the_only_task(name: str, measures: Mapping[str, Any]) -> bool:
    """Whether a measure is the accuracy of one task and the mean over tasks is of it alone."""
    return name.startswith("accuracy/") and sum(other.startswith("accuracy/") for other in measures) == 1


_RESULTS = (
    "Points are means over seeds, whiskers {} t-intervals, small dots the single seeds. Differences are paired: the "
    "same seeds of both rows. The intervals are of one comparison each and are not corrected for their number."
)


def _overview(suite: SuiteDirectory) -> Section:
    runs = suite.table["runs"]
    facts = [
        Fact(label="Runs", value=number(runs["finished"]), note=f"{runs['failed']} failed, {runs['missing']} missing"),
        Fact(label="Seeds a row", value=number(len(suite.table["seeds"])), note=_list(suite.table["seeds"])),
        Fact(
            label="Budgets",
            value=_list([share(b) for b in suite.budgets]) or "none",
            note="share of the positions that carry the loss",
        ),
        Fact(label="Compared with", value=suite.table["baseline"] or "nothing"),
    ]
    found = _notices(suite)
    last: Block = Notices(notices=found) if found else Prose(text="Every run of every row is finished.")
    return Section(key="overview", title="Overview", blocks=[Facts(facts=facts, large=True), last])


def _list(values: Any) -> str:
    return ", ".join(map(str, values))


def name_of(row: Mapping[str, Any]) -> str:
    """A row's method and budget."""
    return str(row["method"]) + ("" if row["budget"] is None else f" at {share(row['budget'])}")


def _notices(suite: SuiteDirectory) -> list[Notice]:
    found = []
    for row in suite.rows:
        if row["failed"]:
            found.append(f"{name_of(row)}: the runs of seed {_list(row['failed'])} failed; the row is of the others.")
        if row["missing"]:
            found.append(f"{name_of(row)}: the runs of seed {_list(row['missing'])} are not made yet.")
    for cell in (suite.table["sweep"] or {"cells": []})["cells"]:
        if cell["chosen"] is None:
            found.append(f"{name_of(cell)}: no learning rate of the sweep finished.")
        elif cell["at_edge"]:
            found.append(
                f"{name_of(cell)}: the chosen learning rate, {number(cell['chosen'])}, is at the end of those tried; a "
                "better one may lie beyond."
            )
    seeds = len(suite.table["seeds"])
    if seeds < 3:
        found.append(f"{seeds} {'seed' if seeds == 1 else 'seeds'} a row: the intervals say next to nothing.")
    if suite.table["sweep"] is None and len({row["lr"] for row in suite.rows if row["trains"]}) == 1:
        found.append("All methods and budgets have one learning rate: what suits one may not suit another.")
    versions = {str(sorted(record.get("versions", {}).items())) for record in suite.records}
    if len(versions) > 1:
        found.append("The runs were made with different versions of packages.")
    return [Notice(level="warning", text=text, source="this report") for text in found]


def _measures(suite: SuiteDirectory, key: str, title: str, names: list[str], lead: str) -> list[Section]:
    blocks: list[Block] = []
    for name in names:
        plots = measure_plots(suite, name, compare=key == "results")
        if plots:
            blocks.append(Plots(title=title_of(suite.table["measures"][name]), plots=plots))
    return [Section(key=key, title=title, lead=lead, blocks=blocks)] if blocks else []


def _table(suite: SuiteDirectory) -> Section:
    table = suite.table
    names = [name for name in table["measures"] if not _is_the_only_task(name, table["measures"])]
    compared = [n for n in names if table["baseline"] is not None and table["measures"][n]["better"] and n not in COSTS]
    header = ["method", "budget", "learning rate", "seeds"]
    for name in names:
        header.append(_heading(table["measures"][name]))
        if name in compared:
            header.append(f"minus {table['baseline']}")
    rows = []
    for row in suite.rows:
        cells = [
            row["method"],
            share(row["budget"]),
            number(row["lr"]),
            number(len(row["seeds"])),
        ]
        for name in names:
            measured = row["measures"][name]
            cells.append(_cell(measured, table["measures"][name]))
            if name in compared:
                cells.append(_cell(measured["versus_baseline"], table["measures"][name], signed=True))
        rows.append(cells)
    note = f"Mean ± half width of the {share(table['confidence'])} t-interval over seeds; pp: percentage points."
    block = Table(
        caption="All rows, on the held-out set",
        header=header,
        rows=rows,
        marked=[row["method"] == table["baseline"] for row in suite.rows],
        note=note,
    )
    return Section(key="table", title="Table", blocks=[block])


def _heading(measure: Mapping[str, Any]) -> str:
    _, unit, kind = unit_of(measure)
    return str(measure["title"]) + (f", {unit}" if unit and unit != "tokens" and kind != "percent" else "")


def _cell(measured: Mapping[str, Any] | None, measure: Mapping[str, Any], *, signed: bool = False) -> str:
    if measured is None or measured["mean"] is None:
        return "–"
    factor, _, kind = unit_of(measure)
    mean, half = measured["mean"] * factor, measured["half_width"]
    sign, unit = ("+" if mean > 0 else "", " pp" if kind == "percent" else "") if signed else ("", "")

    def text(value: float) -> str:
        return number(value, kind) if not unit else number(value * 100)

    return sign + text(mean) + (f" ± {text(half * factor)}" if half is not None else "") + unit


def _curves(suite: SuiteDirectory) -> list[Section]:
    wanted = (
        ("kl_forward", "KL(teacher ‖ student)", "nats a token, on each step's own responses"),
        ("kept_kl_forward", "The same at kept positions", "nats a token"),
        ("grad_norm", "Gradient norm", "before clipping"),
        ("response_length", "Response length", "tokens"),
    )
    plots = [plot for metric, title, unit in wanted for plot in curve_plots(suite, metric, title, unit)]
    if not plots:
        return []
    return [Section(key="curves", title="Training", blocks=[Plots(plots=plots)])]


def _sweep(suite: SuiteDirectory) -> list[Section]:
    sweep = suite.table["sweep"]
    if sweep is None or not sweep["cells"]:
        return []
    lead = (
        f"Of each method and budget the learning rate with the best {sweep['by']} on the validation set was taken, "
        f"over seeds {_list(sweep['seeds'])}; the held-out set had no part in it."
    )
    rows = [
        [
            name_of(cell),
            number(candidate["lr"]),
            number(candidate["mean"]),
            number(candidate["seeds"]),
            number(candidate["failed"]),
            "chosen" if candidate["lr"] == cell["chosen"] else "",
        ]
        for cell in sweep["cells"]
        for candidate in cell["candidates"]
    ]
    header = ["row", "learning rate", sweep["by"], "runs", "failed", ""]
    blocks: list[Block] = [
        Plots(plots=sweep_plots(suite, sweep)),
        Table(
            caption="Every learning rate tried",
            header=header,
            rows=rows,
            marked=[bool(r[-1]) for r in rows],
            folded=True,
        ),
    ]
    return [Section(key="sweep", title="Learning rates", lead=lead, blocks=blocks)]


def _settings(suite: SuiteDirectory) -> Section:
    methods = {row["method"]: row["settings"] for row in suite.rows}
    rows = [
        [name, ", ".join(f"{key}: {value}" for key, value in settings.items()) or "the suite's settings alone"]
        for name, settings in methods.items()
    ]
    blocks: list[Block] = [Table(caption="What a method sets", header=["method", "settings"], rows=rows, words=True)]
    if suite.text is not None:
        blocks.append(Source(caption="The suite file", text=suite.text))
    packages = list(dict.fromkeys(name for record in suite.records for name in record.get("versions", {})))
    versions = [
        [name, _list(sorted({str(record.get("versions", {}).get(name, "–")) for record in suite.records}))]
        for name in packages
    ]
    hosts = _list(sorted({str(record.get("host", "–")) for record in suite.records}))
    versions += [["hosts", hosts or "–"], ["this page", f"megatron_taopd {__version__}"]]
    blocks.append(Table(caption="Versions", header=["what", "of the runs"], rows=versions, words=True))
    return Section(key="configuration", title="Configuration", blocks=blocks)
