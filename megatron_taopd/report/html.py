"""From a page's description to one HTML file that needs nothing else and may do nothing else."""

from __future__ import annotations

import base64
import hashlib
import os
from functools import cache
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from megatron_taopd.report import svg
from megatron_taopd.report.blocks import Page

STYLE, SCRIPT, TEMPLATE = "style.css", "script.js", "page.html.j2"


def render(page: Page) -> str:
    """The HTML text.

    Everything that is not written in this package's templates is escaped. A content security policy allows the
    page's own style and script by their hashes and nothing else, so that text which slipped through could not run.
    """
    style, script = _resource(STYLE), _resource(SCRIPT)
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    template = _environment().get_template(TEMPLATE)
    return template.render(page=page, svg=svg, style=Markup(style), script=Markup(script), policy=policy)


def write_page(page: Page, path: str | Path) -> Path:
    """Write the page, aside first and then by rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(page), encoding="utf-8")
    os.replace(partial, path)
    return path


@cache
def _resource(name: str) -> str:
    return files("megatron_taopd.report").joinpath("templates", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
