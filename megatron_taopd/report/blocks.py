"""What a page is made of. The template has one macro a kind of block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from megatron_taopd.report.checks import Notice
from megatron_taopd.report.plots import Plot
from megatron_taopd.report.texts import TextGroup


@dataclass(kw_only=True)
class Prose:
    """A paragraph."""

    text: str
    kind: str = "prose"


@dataclass(kw_only=True)
class Fact:
    """A figure with its name."""

    label: str
    value: str
    note: str = ""


@dataclass(kw_only=True)
class Facts:
    """Figures side by side."""

    facts: Sequence[Fact]
    large: bool = False
    kind: str = "facts"


@dataclass(kw_only=True)
class Plots:
    """Plots side by side, under a small heading if there is one."""

    plots: Sequence[Plot]
    title: str = ""
    kind: str = "plots"


@dataclass(kw_only=True)
class Table:
    """A table; the first column names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]
    marked: Sequence[bool] = ()
    """Rows that stand out; none where empty."""
    words: bool = False
    """Whether the cells are words, to be read from the left, and not numbers."""
    folded: bool = False
    note: str = ""
    kind: str = "table"


@dataclass(kw_only=True)
class Source:
    """A text file, folded."""

    caption: str
    text: str
    kind: str = "source"


@dataclass(kw_only=True)
class Texts:
    """Responses in colour."""

    groups: Sequence[TextGroup]
    kind: str = "texts"


@dataclass(kw_only=True)
class Notices:
    """What to look at."""

    notices: Sequence[Notice]
    kind: str = "notices"


Block = Prose | Facts | Plots | Table | Source | Texts | Notices


@dataclass(kw_only=True)
class Section:
    """A part of a page with its heading."""

    key: str
    """Fragment of its address."""
    title: str
    lead: str = ""
    blocks: list[Block] = field(default_factory=list)


@dataclass(kw_only=True)
class Page:
    """All that the template is given."""

    kind: str
    """What it is a report of."""
    title: str
    subtitle: str
    sections: list[Section]
    made_with: str

    def plots(self) -> list[Plot]:
        """Every plot, in order."""
        blocks = [block for section in self.sections for block in section.blocks]
        return [plot for block in blocks if isinstance(block, Plots) for plot in block.plots]
