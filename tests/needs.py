"""What tests need and a machine may not have: skipped without it, or failed where it must be there."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Skip the test; with ``TAOPD_TESTS_MUST_RUN=1`` fail it."""
    reason = f"{what}; tools/install_test_packages.sh installs Debian's packages for the tests"
    if os.environ.get("TAOPD_TESTS_MUST_RUN") == "1":
        pytest.fail(reason)
    pytest.skip(reason)
