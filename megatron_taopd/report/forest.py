"""Forest plots: estimates with intervals, a row a name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_taopd.report.plots import SERIES_COLOURS, Axis, Dots, Format, Intervals, Mark, Plot, Rule
from megatron_taopd.report.scales import number

Estimate = tuple[float | None, Sequence[float | None] | None]
"""A value and its interval; None where there is none."""


def finite(value: float | None) -> float:
    """NaN for None, which plots leave out."""
    return math.nan if value is None else float(value)


def ends_of(pair: Sequence[float | None] | None) -> tuple[float, float]:
    """Both ends of an interval."""
    return (math.nan, math.nan) if pair is None else (finite(pair[0]), finite(pair[1]))


def forest(
    *,
    key: str,
    title: str,
    unit: str,
    names: Sequence[str],
    groups: Mapping[str, Sequence[Estimate]],
    rule: tuple[str, float] | None = ("", 0.0),
    singles: Sequence[Sequence[float]] = (),
    format: Format = "number",
    note: str = "",
) -> Plot:
    """Estimates with intervals; several groups lie beside each other in a row.

    Args:
        groups: of each group an estimate a name.
        rule: name and place of a line to compare with.
        singles: the single values behind each name's estimate, drawn as small dots.
    """
    marks: list[Mark] = [Rule(name=rule[0], value=rule[1], axis="x")] if rule is not None else []
    if any(singles):
        places = [i + 0.3 for i, values in enumerate(singles) for _ in values]
        values = [value for own in singles for value in own]
        marks.append(Dots(name="a seed", x=values, y=places, colour="rest", size=4))
    for index, (group, estimates) in enumerate(groups.items()):
        shift = (index - (len(groups) - 1) / 2) * min(0.26, 0.8 / len(groups))
        ends = [ends_of(pair) for _, pair in estimates]
        marks.append(
            Intervals(
                name=group,
                place=[i + shift for i in range(len(estimates))],
                centre=[finite(value) for value, _ in estimates],
                low=[low for low, _ in ends],
                high=[high for _, high in ends],
                colour=SERIES_COLOURS[index % len(SERIES_COLOURS)],
            )
        )
    words = "; ".join(
        f"{name}{f' ({group})' if group else ''} {number(finite(value), format)}"
        for group, estimates in groups.items()
        for name, (value, _) in zip(names, estimates, strict=True)
    )
    return Plot(
        key=key,
        title=title,
        x=Axis(label=unit, format=format),
        y=Axis(label="", names=list(names)),
        marks=marks,
        note=note,
        summary=f"{title}: {words}.",
    )
