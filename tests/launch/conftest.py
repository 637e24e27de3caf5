"""A real SLURM for the tests of this directory, started once."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

import pytest

from tests.launch.cluster import Cluster, missing_programs
from tests.needs import missing


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two idle nodes; the daemons end with the session, whatever happens in it."""
    if programs := missing_programs():
        missing(f"no {', '.join(programs)}")
    if os.geteuid() != 0:
        missing("SLURM's daemons start jobs as root only")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(autouse=True)
def _empty_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """nemo-run reads it, and pytest refuses."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
