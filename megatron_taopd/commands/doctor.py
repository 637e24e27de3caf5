"""``taopd doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_taopd.cli import parse


@dataclass(kw_only=True)
class DoctorConfig:
    """What this machine has, and what will be used."""


def doctor(words: Sequence[str]) -> None:
    """Print the report."""
    parse(DoctorConfig, words, name="doctor")
    from megatron_taopd.doctor import report

    print(report())
