"""From values to pixels, ticks, and numbers as people write them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_taopd.report.plots import Axis, Bars, Curve, Dots, Format, Intervals, Line, Plot, Rule


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A map from values to pixels."""

    low: float
    high: float
    start: float
    """Pixel of ``low``."""
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value; a value that a logarithm does not have lies at the lower end."""
        if self.log:
            if value <= 0:
                return self.start
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def domain(axis: Axis, values: Iterable[float]) -> tuple[float, float]:
    """Ends of an axis: those asked for, else those of the finite values with a little air."""
    if axis.names is not None:
        return -0.5, len(axis.names) - 0.5
    finite = [v for v in values if math.isfinite(v) and (axis.scale == "linear" or v > 0)]
    low = axis.low if axis.low is not None else min(finite, default=0.0 if axis.scale == "linear" else 0.1)
    high = axis.high if axis.high is not None else max(finite, default=1.0)
    if axis.scale == "log":
        if high <= low:
            low, high = low / 2, low * 2
        return low, high if axis.high is not None else high * 1.15
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        return (low if axis.low is not None else low - pad), low + pad
    air = 0.05 * (high - low)
    return (low if axis.low is not None else low - air), (high if axis.high is not None else high + air)


def domains(plot: Plot) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ends of both axes of a plot."""
    xs: list[float] = []
    ys: list[float] = []
    edges: list[float] = []
    for mark in plot.marks:
        if isinstance(mark, Line | Dots | Curve):
            xs += mark.x
            ys += mark.y
        if isinstance(mark, Line):
            edges += mark.x
            ys += [*(mark.low or ()), *(mark.high or ())]
        elif isinstance(mark, Bars):
            xs += [*mark.left, *mark.right]
            edges += [*mark.left, *mark.right]
            ys += mark.height
        elif isinstance(mark, Intervals):
            across, along = (xs, ys) if mark.across == "x" else (ys, xs)
            across += mark.place
            along += [*mark.low, *mark.high, *mark.centre]
        elif isinstance(mark, Rule):
            (xs if mark.axis == "x" else ys).append(mark.value)
    x_low, x_high = domain(plot.x, xs)
    if edges and plot.x.names is None and min(edges) < max(edges):  # series and bars run from edge to edge
        x_low = min(edges) if plot.x.low is None else x_low
        x_high = max(edges) if plot.x.high is None else x_high
    return (x_low, x_high), domain(plot.y, ys)


def ticks(axis: Axis, low: float, high: float, *, most: int = 6) -> list[tuple[float, str]]:
    """Round values between the ends, with their labels."""
    if axis.names is not None:
        return [(float(i), name if len(name) <= 30 else f"{name[:29]}…") for i, name in enumerate(axis.names)]
    if axis.scale == "log":
        found = _log_ticks(axis, low, high, most=most)
        if len(found) > 1:
            return found  # else the axis is so short that it is nearly linear
    step = _round_step((high - low) / (most - 1), whole=axis.format == "integer")
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [(i * step, tick_label(i * step, step, axis.format)) for i in range(first, last + 1)]


def _round_step(least: float, *, whole: bool) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))
    return max(1.0, math.ceil(step)) if whole else step


def _log_ticks(axis: Axis, low: float, high: float, *, most: int) -> list[tuple[float, str]]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / most))
    values = [10.0**p for p in range(first, last + 1, every)]
    if last - first <= 2:
        values = [f * 10.0**p for p in range(first, last + 1) for f in (1, 2, 5)]
    inside = [v for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
    return [(v, tick_label(v, v, axis.format)) for v in inside]


def tick_label(value: float, step: float, kind: Format) -> str:
    """Label of a tick with the digits that its step needs."""
    if kind == "percent":
        value, step = value * 100, step * 100
    magnitude = max(abs(value), step)
    if magnitude and (magnitude >= 1e6 or step < 1e-4):
        text = f"{value:.3g}"
        mantissa, _, exponent = text.partition("e")
        text = f"{mantissa}e{int(exponent)}" if exponent else text
    else:
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        if round(step * 10**decimals) != round(step * 10**decimals, 6):
            decimals += 1  # 2.5 and its like
        text = f"{value:,.{decimals}f}"
    text = "0" if float(text.replace(",", "")) == 0 else text
    return text.replace("-", "−") + (" %" if kind == "percent" else "")


def number(value: float | int | None, kind: Format = "number") -> str:
    """A number in running text or a table: four digits that count, a true minus, a dash for none."""
    if value is None:
        return "–"
    value = float(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if kind == "percent":
        digits = 1 if abs(value) >= 0.1 else 2
        return f"{value * 100:.{digits}f} %".replace("-", "−")
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}".replace("-", "−")
    if kind == "integer":
        return f"{value:,.0f}".replace("-", "−")
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def share(value: float | None) -> str:
    """A share that somebody chose, such as a budget, with the digits that it has."""
    return "–" if value is None else f"{100 * value:g} %"


def duration(seconds: float) -> str:
    """A time span in the two largest units that it has."""
    if not math.isfinite(seconds):
        return number(seconds)
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    parts = []
    for unit, size in units:
        if whole >= size:
            parts.append(f"{whole // size} {unit}")
            whole %= size
    return " ".join(parts[:2])


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest finite value; NaN where there is none."""
    finite = [v for v in values if math.isfinite(v)]
    return (min(finite), max(finite)) if finite else (math.nan, math.nan)
