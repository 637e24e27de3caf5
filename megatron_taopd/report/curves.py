"""The curves of a run, and the table of all its metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_taopd.report.charts import GROUPS, Chart, Trace
from megatron_taopd.report.plots import SERIES_COLOURS, Axis, Colour, Format, Line, Plot
from megatron_taopd.report.run_directory import RunDirectory
from megatron_taopd.report.scales import number, spread
from megatron_taopd.report.series import thin


def curve_groups(run: RunDirectory) -> list[tuple[str, list[Plot]]]:
    """(heading, plots) of what the run recorded."""
    groups = [(group.title, [plot for chart in group.charts if (plot := _plot(chart, run))]) for group in GROUPS]
    return [(title, plots) for title, plots in groups if plots]


def _plot(chart: Chart, run: RunDirectory) -> Plot | None:
    lines: list[Line] = []
    for trace in _expand(chart.traces, run.names()):
        if all(math.isnan(v) for v in run.series(trace.metric)):
            continue
        lines.append(_line(trace, run, SERIES_COLOURS[len(lines) % len(SERIES_COLOURS)]))
    if not lines:
        return None
    note = chart.note
    per_point = thin(run.iterations, run.iterations).per_point
    if per_point > 1:
        note = " ".join(filter(None, [note, f"A point is the mean of {per_point} iterations."]))
    return Plot(
        key=chart.key,
        title=chart.title,
        x=Axis(label="iteration", format="integer"),
        y=Axis(label=chart.unit, low=chart.low, high=chart.high, format=chart.format),
        marks=[*lines],
        note=note,
        summary=f"{chart.title}. " + " ".join(_in_words(line, chart.format) for line in lines),
    )


def _expand(traces: Sequence[Trace], names: Sequence[str]) -> list[Trace]:
    found = []
    for trace in traces:
        pattern = re.compile(re.escape(trace.metric).replace(r"\*", "([^/]+)"))
        for name in names:
            match = pattern.fullmatch(name)
            if match and "*" in trace.metric:
                found.append(Trace(metric=name, name=trace.name.replace("*", match[1]), dashed=trace.dashed))
            elif match:
                found.append(trace)
    return found


def _line(trace: Trace, run: RunDirectory, colour: Colour) -> Line:
    main = thin(run.iterations, run.series(trace.metric))
    low, high, band = main.low, main.high, "range within a point" if main.low else ""
    if trace.band is not None:
        low = thin(run.iterations, run.series(trace.band[0])).y
        high = thin(run.iterations, run.series(trace.band[1])).y
        band = trace.band[2]
        if all(math.isnan(v) for v in [*low, *high]):
            low, high, band = None, None, ""
    return Line(
        name=trace.name,
        x=main.x,
        y=main.y,
        colour=colour,
        dashed=trace.dashed,
        markers=len(main.x) <= 30,
        low=low,
        high=high,
        band=band,
    )


def _in_words(line: Line, kind: Format) -> str:
    finite = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if not finite:
        return f"{line.name}: no number."
    (first_x, first), (last_x, last) = finite[0], finite[-1]
    low, high = spread([y for _, y in finite])
    return (
        f"{line.name}: {number(first, kind)} at iteration {first_x:.0f}, {number(last, kind)} at iteration "
        f"{last_x:.0f}, between {number(low, kind)} and {number(high, kind)}."
    )


@dataclass(kw_only=True)
class MetricRow:
    """A metric in the table of all metrics."""

    name: str
    first: str
    last: str
    mean: str
    lowest: str
    highest: str
    not_finite: int
    """Iterations that recorded something that is no finite number."""


def metric_table(run: RunDirectory) -> list[MetricRow]:
    """Every metric that the run recorded, ``iteration`` aside."""
    rows = []
    for name in run.names():
        if name == "iteration":
            continue
        recorded = [line[name] for line in run.metrics if name in line]
        finite = [v for v in recorded if math.isfinite(v)]
        low, high = spread(finite)
        rows.append(
            MetricRow(
                name=name,
                first=number(recorded[0]),
                last=number(recorded[-1]),
                mean=number(math.fsum(finite) / len(finite) if finite else math.nan),
                lowest=number(low),
                highest=number(high),
                not_finite=len(recorded) - len(finite),
            )
        )
    return rows
