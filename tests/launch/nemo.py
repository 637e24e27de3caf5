"""nemo-run has an environment of its own: tests start the Python of that."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.needs import missing


def python() -> str:
    """The interpreter that has nemo-run and all that this one has."""
    if importlib.util.find_spec("nemo_run") is not None:
        return sys.executable
    own = ROOT / "build/nemo-run/bin/python"
    if not own.exists():
        missing("nemo-run is not installed", "`make nemo-run` does it")
    return str(own)


def environment(home: Path) -> dict[str, str]:
    """For processes of it; nemo-run writes below ``home``."""
    return {**os.environ, "NEMORUN_HOME": str(home)}
