"""One tiny run and one diagnostic for all tests of reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.report.diagnosis import make_report
from tests.report.runs import make_run


@pytest.fixture(scope="session")
def root(pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the run's models, rollouts and score tables; ``make_run(root)`` names that of the run."""
    root = tmp_path_factory.mktemp("report")
    pool(1).run(make_run, root)
    return root


@pytest.fixture(scope="session")
def diagnosis(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Content of a diagnostic's report.json."""
    return make_report(tmp_path_factory.mktemp("bank"))
