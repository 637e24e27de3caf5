"""Plots of a score table: where the kept positions lie, distributions, shares along the response."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from megatron_taopd.report.plots import Axis, Bars, Colour, Curve, Dots, Line, Mark, Plot, Rule
from megatron_taopd.report.scales import number
from megatron_taopd.report.score_tables import ScoreTable
from megatron_taopd.report.series import sample_evenly

MOST_DOTS = 4000
BINS = 40


def table_plots(table: ScoreTable) -> list[Plot]:
    """All plots of a table; their keys begin with its name."""
    return [
        _plane(table),
        _raw_plane(table),
        _concentration(table),
        _histogram(table, "score", "Scores", "score"),
        _histogram(table, "kl_forward", "KL(teacher ‖ student)", "nats, over the whole vocabulary"),
        _by_position(table),
        _histogram(table, "D", "Disagreement D", "nats"),
        _histogram(table, "C", "Compatibility C", "teacher's mass on the student's candidates"),
        _histogram(table, "H", "Entropy H of the student", "nats"),
    ]


def _key(table: ScoreTable, what: str) -> str:
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in table.name)
    return f"{safe}-{what}"


def _histogram(table: ScoreTable, column: str, title: str, unit: str) -> Plot:
    values = table[column]
    finite = np.isfinite(values)
    shown = values[finite]
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (0.0, 1.0)
    if column == "C":
        low, high = 0.0, 1.0
    elif low >= 0:
        low = 0.0
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    marks: list[Mark] = []
    layers: list[tuple[str, np.ndarray, Colour]] = [
        ("all positions", finite, "rest"),
        ("kept", finite & table.keep, "kept"),
    ]
    for name, rows, colour in layers:
        heights = np.histogram(values[rows], bins=edges)[0]
        marks.append(
            Bars(name=name, left=edges[:-1].tolist(), right=edges[1:].tolist(), height=heights.tolist(), colour=colour)
        )
    return Plot(
        key=_key(table, column),
        title=title,
        x=Axis(label=unit),
        y=Axis(label="positions, logarithmic", scale="log", low=0.7, format="integer"),
        marks=marks,
        summary=f"{title}: histogram of {shown.size} positions from {number(low)} to {number(high)}, kept in front.",
    )


def _plane(table: ScoreTable) -> Plot:
    d, c = table["D_norm"], table["C_norm"]
    return Plot(
        key=_key(table, "plane"),
        title="Where the kept positions lie",
        x=Axis(label="disagreement D̃, scaled by its quantiles", low=0, high=1),
        y=Axis(label="compatibility C̃, scaled by its quantiles", low=0, high=1),
        marks=[*_contours(table), *_scatter(table, d, c)],
        note=_dots_note(table),
        summary=_plane_in_words(table),
        tall=True,
    )


def _raw_plane(table: ScoreTable) -> Plot:
    high = float(np.nanquantile(table["D"], 0.995)) or 1.0
    return Plot(
        key=_key(table, "raw-plane"),
        title="The same, as measured",
        x=Axis(label="disagreement D, nats", low=0, high=high),
        y=Axis(label="compatibility C, probability", low=0, high=1),
        marks=[*_scatter(table, table["D"], table["C"]), Rule(name="C = 0.5", value=0.5, axis="y")],
        note="The upper half per cent of D is drawn at the right edge.",
        summary=_plane_in_words(table),
        tall=True,
    )


def _scatter(table: ScoreTable, x: np.ndarray, y: np.ndarray) -> list[Mark]:
    """Dots of positions that are not kept, then of kept ones; each group thinned by one factor."""
    share = min(1.0, MOST_DOTS / len(table))
    marks: list[Mark] = []
    groups: list[tuple[str, np.ndarray, Colour, float]] = [
        ("not kept", np.flatnonzero(~table.keep), "rest", 3.2),
        ("kept", np.flatnonzero(table.keep), "kept", 4.4),
    ]
    for name, rows, colour, size in groups:
        rows = rows[sample_evenly(rows.size, math.ceil(rows.size * share))]
        if rows.size:
            marks.append(Dots(name=name, x=x[rows].tolist(), y=y[rows].tolist(), colour=colour, size=size))
    return marks


def _dots_note(table: ScoreTable) -> str:
    return f"{MOST_DOTS:,} of {len(table):,} positions are drawn, evenly spaced." if len(table) > MOST_DOTS else ""


def _contours(table: ScoreTable) -> list[Curve]:
    """Lines of equal score where the score is a function of D̃ and C̃ that has them."""
    d, c, score = table["D_norm"], table["C_norm"], table["score"]
    if np.allclose(score, d * c, atol=1e-6):
        return [_contour(level, lambda x, s: s / x) for level in (0.1, 0.3, 0.5, 0.7, 0.9)]
    if np.allclose(score, d * (1 - c), atol=1e-6):
        return [_contour(level, lambda x, s: 1 - s / x) for level in (0.1, 0.3, 0.5, 0.7, 0.9)]
    return []


def _contour(level: float, height: Any) -> Curve:
    x = np.linspace(level, 1, 40)
    return Curve(label=f"{level:.1f}", x=x.tolist(), y=[float(height(v, level)) for v in x])


def _plane_in_words(table: ScoreTable) -> str:
    keep = table.keep
    if not keep.any():
        return "Disagreement and compatibility of every position; none is kept."
    parts = [
        f"median {name} is {number(float(np.nanmedian(table[name][keep])))} where kept and "
        f"{number(float(np.nanmedian(table[name][~keep]))) if (~keep).any() else '–'} elsewhere"
        for name in ("D", "C")
    ]
    return f"Disagreement and compatibility of every position: {'; '.join(parts)}."


def _concentration(table: ScoreTable) -> Plot:
    """How much of all KL the best positions hold, by the selector's order and by the best order that there is."""
    kl = np.nan_to_num(table["kl_forward"])
    total = kl.sum() or 1.0
    at = np.unique(np.linspace(0, len(table), 101).round().astype(int))
    marks: list[Mark] = []
    halves = []
    orders: list[tuple[str, np.ndarray, Colour, bool]] = [
        ("by this score", table["score"], "kept", False),
        ("by the KL itself", kl, "c0", True),
    ]
    for name, order, colour, dashed in orders:
        held = np.concatenate([[0.0], np.cumsum(kl[np.argsort(-order, kind="stable")])]) / total
        marks.append(Line(name=name, x=(at / len(table)).tolist(), y=held[at].tolist(), colour=colour, dashed=dashed))
        halves.append(f"{name} the first tenth holds {number(float(held[math.ceil(0.1 * len(table))]), 'percent')}")
    marks.append(Rule(name="kept", value=float(table.keep.mean()), axis="x"))
    return Plot(
        key=_key(table, "concentration"),
        title="Share of the gap held by the best",
        x=Axis(label="share of positions, best first", low=0, high=1, format="percent"),
        y=Axis(label="share of all KL(teacher ‖ student)", low=0, high=1, format="percent"),
        marks=marks,
        summary=f"Share of all KL against share of positions: {'; '.join(halves)}.",
        tall=True,
    )


def _by_position(table: ScoreTable) -> Plot:
    position, keep = table["position"], table.keep
    width = max(1, math.ceil((int(position.max()) + 1) / 16))
    bucket = position // width
    count = np.bincount(bucket)
    kept = np.bincount(bucket, weights=keep)
    share = np.divide(kept, count, out=np.zeros_like(kept), where=count > 0)
    left = np.arange(count.size) * width
    return Plot(
        key=_key(table, "positions"),
        title="Share kept along the response",
        x=Axis(label="position in the response", format="integer"),
        y=Axis(label="of the positions there", format="percent", low=0),
        marks=[
            Bars(name="kept", left=left.tolist(), right=(left + width).tolist(), height=share.tolist(), colour="kept"),
            Rule(name="all positions", value=float(keep.mean()), axis="y"),
        ],
        summary=f"Share of positions kept in stretches of {width}: "
        + ", ".join(f"{number(float(s), 'percent')} from {a}" for a, s in zip(left, share, strict=True)),
    )
