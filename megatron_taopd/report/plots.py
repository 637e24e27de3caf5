"""What a plot shows, apart from how it is drawn: :mod:`svg` draws it for the page, :mod:`png` for papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Colour = Literal["c0", "c1", "c2", "c3", "c4", "c5", "kept", "rest", "muted"]
"""``c0`` to ``c5`` tell series apart; ``kept`` and ``rest`` mean the same in every plot."""
SERIES_COLOURS: tuple[Colour, ...] = ("c0", "c1", "c2", "c3", "c4", "c5")
Format = Literal["number", "percent", "integer"]


@dataclass(kw_only=True)
class Axis:
    """One axis."""

    label: str
    scale: Literal["linear", "log"] = "linear"
    low: float | None = None
    """End of the axis; None: that of the data."""
    high: float | None = None
    format: Format = "number"
    names: Sequence[str] | None = None
    """Categories at 0, 1, 2, … instead of numbers."""


@dataclass(kw_only=True)
class Line:
    """A polyline; values that are not finite interrupt it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: Colour = "c0"
    dashed: bool = False
    markers: bool = False
    low: Sequence[float] | None = None
    """With ``high`` a band around the line."""
    high: Sequence[float] | None = None
    band: str = ""
    """What the band is."""


@dataclass(kw_only=True)
class Dots:
    """Points of a scatter plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: Colour
    size: float = 2.4
    """Diameter in hundredths of a plot's width, near enough: pixels of a plot 400 wide."""


@dataclass(kw_only=True)
class Bars:
    """Bars of a histogram, or one a category."""

    name: str
    left: Sequence[float]
    right: Sequence[float]
    height: Sequence[float]
    colour: Colour


@dataclass(kw_only=True)
class Intervals:
    """Estimates with an interval: a value a category along ``across``."""

    name: str
    place: Sequence[float]
    centre: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: Colour = "c0"
    across: Literal["x", "y"] = "y"
    """The axis of ``place``; the values lie on the other."""


@dataclass(kw_only=True)
class Rule:
    """A straight line across the plot at one value."""

    name: str
    value: float
    axis: Literal["x", "y"]
    """The axis that ``value`` is on."""


@dataclass(kw_only=True)
class Curve:
    """A quiet guide line with its label at its end, such as a contour."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


Mark = Line | Dots | Bars | Intervals | Rule | Curve


@dataclass(kw_only=True)
class Plot:
    """A plot with its words."""

    key: str
    """Name of the PNG file and of the element in the page: letters, digits, ``_`` and ``-``."""
    title: str
    x: Axis
    y: Axis
    marks: list[Mark] = field(default_factory=list)
    note: str = ""
    """A sentence below."""
    summary: str = ""
    """What it shows, in words, for those who do not see it."""
    tall: bool = False
    """As high as wide, for planes."""

    def lines(self) -> list[Line]:
        """The series that a reader may point at."""
        return [mark for mark in self.marks if isinstance(mark, Line)]

    def legend(self) -> list[tuple[str, str, Colour]]:
        """(name, kind, colour) of what needs a name, in drawing order, each name once."""
        entries: dict[str, tuple[str, str, Colour]] = {}
        for mark in self.marks:
            if isinstance(mark, Curve) or not mark.name:
                continue
            if isinstance(mark, Rule):
                entries.setdefault(mark.name, (mark.name, "rule", "muted"))
            else:
                dashed = isinstance(mark, Line) and mark.dashed
                kind = "dashed" if dashed else type(mark).__name__.lower()
                entries.setdefault(mark.name, (mark.name, kind, mark.colour))
            if isinstance(mark, Line) and mark.band:
                entries.setdefault(mark.band, (mark.band, "band", mark.colour))
        return list(entries.values())
