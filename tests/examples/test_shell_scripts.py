"""Every shell script that is written by hand, as a linter reads it."""

from __future__ import annotations

import shutil
import subprocess

from tests.conftest import ROOT
from tests.needs import missing


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        missing("no shellcheck")
    scripts = sorted([*ROOT.glob("examples/**/*.sh"), *ROOT.glob("tools/*.sh"), ROOT / ".ci/run"])
    assert len(scripts) > 10
    # -x follows the files that a script sources; their paths are from the script's own directory.
    command = ["shellcheck", "-x", "--source-path=SCRIPTDIR", *map(str, scripts)]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stdout + answer.stderr
