"""What tests need and a machine may not have: skipped without it, or failed where it must be there."""

from __future__ import annotations

import importlib.util
import os
from typing import NoReturn

import pytest

PACKAGES = "tools/install_test_packages.sh installs Debian's packages for the tests"


def missing(what: str, remedy: str = PACKAGES) -> NoReturn:
    """Skip the test; with ``TAOPD_TESTS_MUST_RUN=1`` fail it."""
    reason = f"{what}; {remedy}"
    if os.environ.get("TAOPD_TESTS_MUST_RUN") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def needs_module(name: str) -> None:
    """Of the developers' extra."""
    if importlib.util.find_spec(name) is None:
        missing(f"{name} is not installed", 'pip install -e ".[dev]" installs it')
