"""Numbers, ticks, thinning and marks of plots, each against what was worked out by hand."""

from __future__ import annotations

import math
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from megatron_taopd.report import svg
from megatron_taopd.report.plots import Axis, Bars, Curve, Dots, Intervals, Line, Plot, Rule
from megatron_taopd.report.png import write_pngs
from megatron_taopd.report.scales import domains, duration, number, share, ticks
from megatron_taopd.report.series import MOST_POINTS, sample_evenly, thin
from megatron_taopd.report.texts import visible
from tests.report.pages import parse


@pytest.mark.parametrize(
    "value, kind, text",
    [
        (0.123456, "number", "0.1235"),
        (-12.5, "number", "−12.5"),
        (1234567.0, "number", "1,234,567"),
        (1234.5, "number", "1,234"),
        (0.00005, "number", "5e−5"),
        (3.25e12, "number", "3.25e12"),
        (0, "number", "0"),
        (math.nan, "number", "not a number"),
        (-math.inf, "number", "−∞"),
        (None, "number", "–"),
        (0.1066, "percent", "10.7 %"),
        (0.01234, "percent", "1.23 %"),
        (41.7, "integer", "42"),
    ],
)
def test_numbers(value: float | None, kind: str, text: str) -> None:
    assert number(value, kind) == text


def test_shares_and_durations() -> None:
    assert [share(v) for v in (0.05, 0.1, 0.025, 1.0, None)] == ["5 %", "10 %", "2.5 %", "100 %", "–"]
    assert [duration(v) for v in (4.25, 595, 3600, 90061)] == ["4.25 s", "9 min 55 s", "1 h", "1 d 1 h"]


@pytest.mark.parametrize(
    "axis, ends, labels",
    [
        (Axis(label=""), (0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (Axis(label=""), (99, 111), ["100.0", "102.5", "105.0", "107.5", "110.0"]),
        (Axis(label=""), (-0.3, 0.3), ["−0.2", "0", "0.2"]),
        (Axis(label="", format="percent"), (0, 0.12), ["0 %", "2.5 %", "5.0 %", "7.5 %", "10.0 %"]),
        (Axis(label="", format="integer"), (1, 3), ["1", "2", "3"]),
        (Axis(label="", scale="log"), (0.7, 500), ["1", "10", "100"]),
        (Axis(label="", scale="log", format="percent"), (0.01, 0.1), ["1 %", "2 %", "5 %", "10 %"]),
        (Axis(label="", scale="log"), (0.11, 0.14), ["0.11", "0.12", "0.13", "0.14"]),
        (Axis(label=""), (0, 5e-5), ["0", "1e−5", "2e−5", "3e−5", "4e−5", "5e−5"]),
        (Axis(label="", names=["a", "b" * 40]), (0, 1), ["a", "b" * 29 + "…"]),
    ],
)
def test_ticks(axis: Axis, ends: tuple[float, float], labels: list[str]) -> None:
    found = ticks(axis, *ends)
    assert [label for _, label in found] == labels
    if axis.names is None:
        assert all(ends[0] <= value <= ends[1] for value, _ in found)


def test_thinning_keeps_the_range_and_the_mean() -> None:
    values = np.ones(10_000)
    values[7_777], values[5] = 50.0, math.nan
    thinned = thin(range(10_000), values)
    assert len(thinned.x) == 239 <= MOST_POINTS and thinned.per_point == 42
    assert max(thinned.high) == 50.0 and thinned.y[7_777 // 42] == pytest.approx(1 + 49 / 42)
    assert thinned.y[0] == 1.0 and thinned.x[0] == pytest.approx(20.5)
    few = thin([1, 2], [3.0, math.nan])
    assert few.x == [1, 2] and few.low is None and few.per_point == 1
    assert sample_evenly(10, 4) == [0, 2, 5, 7] and sample_evenly(3, 4) == [0, 1, 2]


def plot_of(*marks: object, **more: object) -> Plot:
    return Plot(key="k", title="t", x=Axis(label="x", **more), y=Axis(label="y"), marks=list(marks))


def test_a_value_that_is_not_finite_interrupts_a_line() -> None:
    line = Line(name="a", x=[1, 2, 3, 4, 5], y=[1, math.nan, 3, 4, math.inf])
    figure = parse(str(svg.draw(plot_of(line))))
    paths = [p.attributes["d"] for p in figure.all("path", "line")]
    assert len(paths) == 1 and paths[0].count("M") == 2 and paths[0].count("L") == 1
    assert figure.all("path", "dots")[0].attributes["d"].count("h0") == 1  # the lonely first value is a dot
    assert '"y":[1,null,3,4,null]' in svg.hover_data(plot_of(line))


def test_ends_of_axes() -> None:
    bars = Bars(name="a", left=[0, 1], right=[1, 2], height=[3, 0], colour="rest")
    assert domains(plot_of(bars))[0] == (0, 2)
    interval = Intervals(name="a", place=[0], centre=[1.0], low=[0.5], high=[2.0])
    low, high = domains(plot_of(interval, Rule(name="", value=0.0, axis="x")))[0]
    assert low < 0 and high > 2.0
    constant = Line(name="a", x=[1], y=[7.0])
    assert domains(plot_of(constant))[1] == pytest.approx((6.3, 7.7))


def test_text_in_plots_is_escaped() -> None:
    evil = "<script>\"&'</script>"
    plot = Plot(
        key="k",
        title=evil,
        x=Axis(label=evil),
        y=Axis(label=evil, names=[evil]),
        marks=[Line(name=evil, x=[1.0], y=[0.0]), Curve(label=evil, x=[1.0], y=[0.0])],
        summary=evil,
    )
    figure = parse(str(svg.draw(plot)))
    assert not figure.all("script") and figure.text.count(evil) == 3
    assert "<" not in svg.hover_data(plot) and "\\u003cscript" in svg.hover_data(plot)


def test_characters_that_garble_a_page_are_spelled_out() -> None:
    assert visible("a\u202eb\x07c\ud800\tü\u200d") == "a⟨right-to-left override⟩b⟨u+0007⟩c?\tü⟨zero width joiner⟩"


def test_pngs_show_every_kind_of_mark(tmp_path: Path) -> None:
    x = [1.0, 2.0, 3.0]
    plots = [
        plot_of(
            Line(name="a", x=x, y=[1, math.nan, 3], low=[0, 1, 2], high=[2, 3, 4]), Rule(name="r", value=2, axis="y")
        ),
        plot_of(Dots(name="a", x=x, y=x, colour="kept", size=9), Curve(label="0.5", x=x, y=x)),
        plot_of(Bars(name="a", left=[1, 2], right=[2, 3], height=[5, 9], colour="rest"), scale="log"),
        Plot(
            key="forest",
            title="t",
            x=Axis(label="x", format="percent"),
            y=Axis(label="", names=["one", "two"]),
            marks=[Intervals(name="", place=[0, 1], centre=[1, math.nan], low=[0, 1], high=[2, 3], colour="kept")],
        ),
    ]
    for index, plot in enumerate(plots):
        plot.key = f"p{index}"
    for path, colour in zip(write_pngs(plots, tmp_path, dots_per_inch=60), ("c0", "kept", "rest", "kept"), strict=True):
        picture = matplotlib.image.imread(path)[:, :, :3]
        wanted = {"c0": (43, 108, 176), "kept": (209, 72, 15), "rest": (138, 151, 166)}[colour]
        near = (np.abs(picture - np.array(wanted) / 255) < 0.2).all(axis=2)
        assert near.sum() > 8, path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p0.png", "p1.png", "p2.png", "p3.png"]


def test_crowded_dots_are_painted_in_groups() -> None:
    """One path paints an overlap once, so that a crowd needs several to look dense."""
    figure = parse(str(svg.draw(plot_of(Dots(name="a", x=[0.5] * 120, y=[0.5] * 120, colour="rest")))))
    counts = [len(re.findall("h0", p.attributes["d"])) for p in figure.all("path", "dots")]
    assert counts == [50, 50, 20]
