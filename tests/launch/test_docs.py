"""The commands of docs/slurm.md are accepted as they stand there."""

from __future__ import annotations

import importlib.util
import re
import shlex

import pytest

from megatron_taopd import cli
from tests.conftest import ROOT

TEXT = (ROOT / "docs/slurm.md").read_text()
CPU = re.search(r'CPU="([^"]*)"', TEXT)


def commands() -> list[list[str]]:
    """Whole `taopd launch …` commands; those with an ellipsis are sketches."""
    lines = TEXT.replace("\\\n", " ").replace("$CPU", CPU[1] if CPU else "").splitlines()
    shown = [line for line in lines if line.startswith("taopd launch") and "…" not in line]
    return [shlex.split(line, comments=True)[1:] for line in shown]


def test_there_are_commands() -> None:
    assert [words[-1] for words in commands()].count("doctor") == 1 and len(commands()) >= 5


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words)[:60])
def test_command(words: list[str]) -> None:
    if words[1] == "nemo-run" and importlib.util.find_spec("nemo_run") is None:
        pytest.skip("nemo-run is not installed")
    assert cli.run([*words[:2], "--dry-run", *words[2:]]) == 0
