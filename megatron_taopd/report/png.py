"""The plots of a page as PNG files, drawn by matplotlib, for papers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron_taopd.errors import ConfigError
from megatron_taopd.report.plots import Axis, Bars, Curve, Dots, Intervals, Line, Plot, Rule
from megatron_taopd.report.scales import domains, ticks

COLOURS = {
    "c0": "#2b6cb0",
    "c1": "#c2571a",
    "c2": "#2f855a",
    "c3": "#7b4fa6",
    "c4": "#a67c00",
    "c5": "#b83272",
    "kept": "#d1480f",
    "rest": "#8a97a6",
    "muted": "#6b7280",
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#6b7280",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e5ea",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}


def write_pngs(plots: Iterable[Plot], directory: str | Path, *, dots_per_inch: int = 200) -> list[Path]:
    """Write ``KEY.png`` a plot, 4.2 inches wide.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f'--png needs matplotlib ({error}); pip install -e ".[report]"') from error
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for plot in plots:
        rows = len(plot.y.names) if plot.y.names is not None else 0
        height = 4.0 if plot.tall else (0.9 + 0.28 * rows if rows else 2.8)
        height += 0.17 * math.ceil(len(plot.legend()) / 3)
        with rc_context(STYLE):
            figure = Figure(figsize=(4.2, max(height, 1.6)), layout="constrained")
            _draw(plot, figure)
            paths.append(directory / f"{plot.key}.png")
            figure.savefig(paths[-1], dpi=dots_per_inch)
    return paths


def _draw(plot: Plot, figure: Any) -> None:
    axes = figure.subplots()
    (x_low, x_high), (y_low, y_high) = domains(plot)
    for mark in plot.marks:
        _DRAW[type(mark)](mark, axes)
    _set_axis(plot.x, axes.xaxis, x_low, x_high)
    _set_axis(plot.y, axes.yaxis, y_low, y_high)
    label = textwrap.fill(plot.y.label, 36)
    axes.set(title=plot.title, xlabel=plot.x.label, ylabel=label, xlim=(x_low, x_high), ylim=(y_low, y_high))
    if plot.y.names is not None:
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    if len(plot.legend()) > 1:
        figure.legend(loc="outside lower center", ncols=min(3, len(plot.legend())))


def _set_axis(axis: Axis, drawn: Any, low: float, high: float) -> None:
    """The ticks of the page."""
    if axis.scale == "log":
        drawn.axes.set(**{f"{drawn.axis_name}scale": "log"})
    found = ticks(axis, low, high)
    drawn.set_ticks([value for value, _ in found], labels=[label for _, label in found])
    drawn.set_ticks([], minor=True)


def _line(mark: Line, axes: Any) -> None:
    colour = COLOURS[mark.colour]
    if mark.low is not None and mark.high is not None:
        label = mark.band or None
        axes.fill_between(mark.x, mark.low, mark.high, color=colour, alpha=0.18, linewidth=0, label=label)
    marker = "o" if mark.markers or len(mark.x) == 1 else None
    style = "--" if mark.dashed else "-"
    axes.plot(mark.x, mark.y, style, color=colour, linewidth=1.3, marker=marker, markersize=3, label=mark.name or None)


def _dots(mark: Dots, axes: Any) -> None:
    axes.scatter(
        *(mark.x, mark.y),
        s=mark.size**2,
        color=COLOURS[mark.colour],
        alpha=0.5 if mark.colour == "rest" else 0.85,
        linewidths=0,
        label=mark.name or None,
        zorder=2 if mark.colour == "rest" else 3,
    )


def _bars(mark: Bars, axes: Any) -> None:
    widths = [right - left for left, right in zip(mark.left, mark.right, strict=True)]
    axes.bar(mark.left, mark.height, widths, align="edge", color=COLOURS[mark.colour], label=mark.name or None)


def _intervals(mark: Intervals, axes: Any) -> None:
    below = [centre - low for centre, low in zip(mark.centre, mark.low, strict=True)]
    above = [high - centre for centre, high in zip(mark.centre, mark.high, strict=True)]
    style = {"fmt": "o", "markersize": 4, "color": COLOURS[mark.colour], "label": mark.name or None, "linewidth": 1.4}
    if mark.across == "y":
        axes.errorbar(mark.centre, mark.place, xerr=(below, above), **style)
    else:
        axes.errorbar(mark.place, mark.centre, yerr=(below, above), **style)


def _rule(mark: Rule, axes: Any) -> None:
    draw = axes.axvline if mark.axis == "x" else axes.axhline
    draw(mark.value, color=COLOURS["muted"], linewidth=0.9, linestyle=":", label=mark.name or None)


def _curve(mark: Curve, axes: Any) -> None:
    axes.plot(mark.x, mark.y, color="#c4cad3", linewidth=0.7, zorder=1)
    axes.annotate(
        mark.label,
        (mark.x[-1], mark.y[-1]),
        fontsize=7,
        color=COLOURS["muted"],
        ha="right",
        va="bottom",
    )


_DRAW: dict[type, Callable[[Any, Any], None]] = {
    Line: _line,
    Dots: _dots,
    Bars: _bars,
    Intervals: _intervals,
    Rule: _rule,
    Curve: _curve,
}
