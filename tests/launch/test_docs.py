"""The commands of docs/slurm.md are accepted as they stand there, and what is planned there fits."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_taopd import cli
from tests.conftest import ROOT

TEXT = (ROOT / "docs/slurm.md").read_text()
VARIABLES = dict(re.findall(r'^([A-Z]+)=("[^"]*"|\S+)$', TEXT, re.M))


def commands(start: str = "taopd launch") -> list[list[str]]:
    """Whole commands that start so; those with an ellipsis are sketches."""
    text = TEXT.replace("\\\n", " ")
    for name in ("CPU", "C", "RUN"):
        text = re.sub(rf"\${name}\b", " ".join(VARIABLES[name].strip('"').split()), text)
    lines = text.splitlines()
    shown = [line for line in lines if line.startswith(start) and "…" not in line]
    return [shlex.split(line, comments=True)[1:] for line in shown]


def test_there_are_commands() -> None:
    assert [words[-1] for words in commands()].count("doctor") == 1 and len(commands()) >= 5


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_command(words: list[str]) -> None:
    assert cli.run([*words[:2], "--dry-run", *words[2:]]) == 0


@pytest.mark.parametrize("words", commands("taopd plan"), ids=lambda words: Path(words[2]).name)
def test_plan(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.run(words) == 0
    sizes = re.search(r"It fits: \S+ of \S+ GiB", capsys.readouterr().out)
    assert sizes is not None and f"# {sizes[0]}" in TEXT
