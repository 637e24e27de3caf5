"""What tests need and a machine may not have: skipped without it, or failed where it must be there."""

from __future__ import annotations

import importlib.util
import os
from typing import NoReturn

import pytest
import torch

from megatron_taopd.ops.fp8 import FP8_CAPABILITY

PACKAGES = "tools/install_test_packages.sh installs Debian's packages for the tests"


HAS_FP8_UNITS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= FP8_CAPABILITY
FP8_GPU = (pytest.mark.gpu, pytest.mark.skipif(not HAS_FP8_UNITS, reason="needs a CUDA device with FP8 units"))
FP8_DEVICES = ["cpu", pytest.param("cuda", marks=FP8_GPU)]
"""A test of an FP8 head has one body; a CPU emulates what the GPU is for."""


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
