"""A plot as inline SVG that takes its colours and fonts from the page, so that it follows light, dark and print."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup, escape

from megatron_taopd.report.plots import Bars, Curve, Dots, Intervals, Line, Plot, Rule
from megatron_taopd.report.scales import Scale, domains, ticks

WIDTH, HEIGHT, TALL, ROW = 400, 220, 350, 24  # ROW: of a category on the y axis
TOP, RIGHT, BOTTOM = 10, 14, 36
DIGIT = 6.3  # width of a digit of the tick labels
DOTS_A_PATH = 50  # one path paints an overlap once; several let a crowd of dots look dense


def draw(plot: Plot) -> Markup:
    """The ``<svg>`` element."""
    (x_low, x_high), (y_low, y_high) = domains(plot)
    height = TALL if plot.tall else HEIGHT
    if plot.y.names is not None:
        groups = sum(isinstance(mark, Intervals) for mark in plot.marks)
        height = TOP + BOTTOM + (ROW + 7 * max(0, groups - 1)) * len(plot.y.names)
    y_ticks = ticks(plot.y, y_low, y_high, most=max(3, (height - TOP - BOTTOM) // 29))
    left = round(12 + DIGIT * max((len(label) for _, label in y_ticks), default=1))
    # Categories read from top to bottom, numbers from bottom to top.
    y_ends = (TOP, height - BOTTOM) if plot.y.names is not None else (height - BOTTOM, TOP)
    right = WIDTH - (2 * RIGHT if any(isinstance(mark, Curve) for mark in plot.marks) else RIGHT)
    x = Scale(low=x_low, high=x_high, start=left, end=right, log=plot.x.scale == "log")
    y = Scale(low=y_low, high=y_high, start=y_ends[0], end=y_ends[1], log=plot.y.scale == "log")
    parts = [*_axes(plot, x, y, y_ticks, height)]
    for mark in plot.marks:
        parts += _DRAW[type(mark)](mark, x, y)
    shared = _shared_x(plot)
    if shared is not None:
        bottom = height - BOTTOM
        parts.append(_tag("line", class_="cross", x1=0, x2=0, y1=TOP, y2=bottom, data_left=left, data_right=right))
    svg = _open("svg", viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=plot.summary or plot.title)
    return Markup("").join([svg, *parts, Markup("</svg>")])


def hover_data(plot: Plot) -> Markup | None:
    """What the page's script shows under the pointer, as JSON that is safe inside ``<script>``; None for plots without
    series over one common x."""
    shared = _shared_x(plot)
    if shared is None:
        return None
    (low, high), _ = domains(plot)
    series = [
        {"name": line.name, "colour": line.colour, "y": [_short(v) for v in line.y]}
        | (
            {"low": [_short(v) for v in line.low], "high": [_short(v) for v in line.high]}
            if line.low and line.high
            else {}
        )
        for line in plot.lines()
    ]
    data = {
        "x": [_short(v) for v in shared],
        "label": plot.x.label,
        "low": low,
        "high": high,
        "log": plot.x.scale == "log",
        "percent": plot.y.format == "percent",
        "series": series,
    }
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _shared_x(plot: Plot) -> Sequence[float] | None:
    lines = plot.lines()
    if not lines or any(list(line.x) != list(lines[0].x) for line in lines):
        return None
    return lines[0].x


def _short(value: float) -> float | int | None:
    """Six digits that count; None for what JSON has no number for."""
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.6g}")


def _axes(plot: Plot, x: Scale, y: Scale, y_ticks: list[tuple[float, str]], height: int) -> list[Markup]:
    left, right, bottom = x.start, x.end, height - BOTTOM
    parts = []
    for value, label in y_ticks:
        at = y(value)
        if plot.y.names is None:
            parts.append(_tag("path", class_="grid", d=f"M{_px(left)} {_px(at)}H{_px(right)}"))
        parts.append(_tag("text", label, class_="tick", x=_px(left - 6), y=_px(at + 3.6), text_anchor="end"))
    x_ticks = ticks(plot.x, x.low, x.high, most=6)
    if plot.x.names is None:
        widest = max((len(label) for _, label in x_ticks), default=1)
        x_ticks = ticks(plot.x, x.low, x.high, most=max(2, min(6, int((right - left) / (DIGIT * widest + 14)))))
    for value, label in x_ticks:
        at = x(value)
        if plot.tall or plot.y.names is not None:
            parts.append(_tag("path", class_="grid", d=f"M{_px(at)} {TOP}V{bottom}"))
        else:
            parts.append(_tag("path", class_="axis", d=f"M{_px(at)} {bottom}v4"))
        anchor = "end" if at > right - 10 and plot.x.names is None else "middle"
        parts.append(
            _tag(
                "text",
                label,
                class_="tick",
                x=_px(at if anchor == "middle" else right),
                y=bottom + 16,
                text_anchor=anchor,
            )
        )
    parts.append(_tag("path", class_="axis", d=f"M{_px(left)} {bottom}H{_px(right)}"))
    parts.append(_tag("text", plot.x.label, class_="label", x=_px(right), y=bottom + 31, text_anchor="end"))
    return parts


def _line(mark: Line, x: Scale, y: Scale) -> list[Markup]:
    parts = []
    if mark.low is not None and mark.high is not None:
        runs = _runs(list(zip(mark.x, mark.low, mark.high, strict=True)))
        d = "".join(
            _polyline([(x(a), _clamp(y, low)) for a, low, _ in run])
            + _polyline([(x(a), _clamp(y, high)) for a, _, high in reversed(run)]).replace("M", "L", 1)
            + "Z"
            for run in runs
        )
        parts.append(_tag("path", class_=f"band {mark.colour}", d=d))
    runs_of_line = [[(x(a), _clamp(y, b)) for a, b in run] for run in _runs(list(zip(mark.x, mark.y, strict=True)))]
    class_ = f"line {mark.colour}" + (" dashed" if mark.dashed else "")
    parts.append(_tag("path", class_=class_, d="".join(_polyline(run) for run in runs_of_line)))
    alone = [run[0] for run in runs_of_line if len(run) == 1]
    dots = [point for run in runs_of_line for point in run] if mark.markers else alone
    if dots:
        parts.append(_tag("path", class_=f"dots {mark.colour}", stroke_width=4.5, d=_points(dots)))
    return parts


def _runs(rows: list[tuple[float, ...]]) -> list[list[tuple[float, ...]]]:
    """Stretches of rows in which every number is finite."""
    runs: list[list[tuple[float, ...]]] = [[]]
    for row in rows:
        if all(map(math.isfinite, row)):
            runs[-1].append(row)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _dots(mark: Dots, x: Scale, y: Scale) -> list[Markup]:
    points = [(_clamp(x, a), _clamp(y, b)) for a, b in zip(mark.x, mark.y, strict=True) if math.isfinite(a + b)]
    groups = [points[i : i + DOTS_A_PATH] for i in range(0, len(points), DOTS_A_PATH)]
    return [_tag("path", class_=f"dots {mark.colour}", stroke_width=mark.size, d=_points(group)) for group in groups]


def _bars(mark: Bars, x: Scale, y: Scale) -> list[Markup]:
    floor = max(y.low, 0.0)
    d = ""
    for left, right, height in zip(mark.left, mark.right, mark.height, strict=True):
        if height > 0 and math.isfinite(height):
            a, b = x(left) + 0.5, x(right) - 0.5
            d += f"M{_px(a)} {_px(y(floor))}V{_px(_clamp(y, height))}H{_px(max(b, a + 0.5))}V{_px(y(floor))}Z"
    return [_tag("path", class_=f"bar {mark.colour}", d=d)]


def _intervals(mark: Intervals, x: Scale, y: Scale) -> list[Markup]:
    whiskers, centres = "", []
    for place, centre, low, high in zip(mark.place, mark.centre, mark.low, mark.high, strict=True):
        if not math.isfinite(centre):
            continue
        if mark.across == "y":
            centres.append((x(centre), y(place)))
            if math.isfinite(low + high):
                whiskers += f"M{_px(x(low))} {_px(y(place))}H{_px(x(high))}"
        else:
            centres.append((x(place), y(centre)))
            if math.isfinite(low + high):
                whiskers += f"M{_px(x(place))} {_px(y(low))}V{_px(y(high))}"
    return [
        _tag("path", class_=f"whisker {mark.colour}", d=whiskers),
        _tag("path", class_=f"dots solid {mark.colour}", stroke_width=8, d=_points(centres)),
    ]


def _rule(mark: Rule, x: Scale, y: Scale) -> list[Markup]:
    if mark.axis == "x":
        d = f"M{_px(_clamp(x, mark.value))} {_px(min(y.start, y.end))}V{_px(max(y.start, y.end))}"
    else:
        d = f"M{_px(x.start)} {_px(_clamp(y, mark.value))}H{_px(x.end)}"
    return [_tag("path", class_="rule", d=d)]


def _curve(mark: Curve, x: Scale, y: Scale) -> list[Markup]:
    points = [(_clamp(x, a), _clamp(y, b)) for a, b in zip(mark.x, mark.y, strict=True)]
    at = points[-1]
    return [
        _tag("path", class_="guide", d=_polyline(points)),
        _tag("text", mark.label, class_="tick", x=_px(at[0] + 5), y=_px(at[1] + 3.6)),
    ]


_DRAW: dict[type, Callable[[Any, Scale, Scale], list[Markup]]] = {
    Line: _line,
    Dots: _dots,
    Bars: _bars,
    Intervals: _intervals,
    Rule: _rule,
    Curve: _curve,
}


def _clamp(scale: Scale, value: float) -> float:
    return min(max(scale(value), min(scale.start, scale.end)), max(scale.start, scale.end))


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _polyline(points: Sequence[tuple[float, float]]) -> str:
    return "".join(f"{'L' if i else 'M'}{_px(a)} {_px(b)}" for i, (a, b) in enumerate(points))


def _points(points: Sequence[tuple[float, float]]) -> str:
    return "".join(f"M{_px(a)} {_px(b)}h0" for a, b in points)


def _open(name: str, **attributes: object) -> Markup:
    words = (Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    return Markup("<") + Markup(name) + Markup("").join(words) + Markup(">")


def _tag(name: str, content: str | None = None, **attributes: object) -> Markup:
    return _open(name, **attributes) + (escape(content) if content is not None else "") + Markup(f"</{name}>")
