"""Reading a page back: its elements, and what Chromium makes of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from tests.needs import missing

VOID = {"meta", "br", "input"}


@dataclass
class Element:
    """An element of a parsed page."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def classes(self) -> set[str]:
        return set((self.attributes.get("class") or "").split())

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str | None = None, class_: str | None = None) -> list[Element]:
        """Elements below, in order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if tag in (None, child.tag) and (class_ is None or class_ in child.classes):
                    found.append(child)
                found += child.all(tag, class_)
        return found

    def by_id(self, id_: str) -> Element:
        return next(e for e in self.all() if e.attributes.get("id") == id_)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("document", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        assert len(attrs) == len(element.attributes), f"an attribute twice: {attrs}"
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(text: str) -> Element:
    """The elements of a page; fails where tags do not nest."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1, f"never closed: {[e.tag for e in reader.open[1:]]}"
    return reader.open[0]


def series(page: Element, plot: str) -> dict[str, list[float]]:
    """What the pointer finds in a plot: ``x`` and the values of each series by name."""
    data = json.loads(page.by_id(f"plot-{plot}").all("script")[0].text)
    return {"x": data["x"]} | {one["name"]: one["y"] for one in data["series"]}


def table(page: Element, caption: str) -> list[list[str]]:
    """Rows of the table with a caption or a summary, as text, header first."""
    for region in page.all("div", "scroll"):
        if region.attributes["aria-label"] == caption:
            return [[cell.text for cell in row.children if isinstance(cell, Element)] for row in region.all("tr")]
    raise AssertionError(f"no table {caption!r}")


def chromium(*flags: str, page: Path, scratch: Path) -> str:
    """Run a headless Chromium on a page; returns its standard output. Skips where there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        missing("no chromium")
    command = [
        *(program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={scratch}"),
        *(*flags, page.resolve().as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
