"""``taopd diagnose report``: report.json, report.md and plots of a bank and the gain of some checkpoints on it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_taopd.diagnostics.analysis import analyse
from megatron_taopd.diagnostics.bank import Bank, open_bank
from megatron_taopd.diagnostics.config import ReportConfig
from megatron_taopd.diagnostics.gain import Gain, read_gain
from megatron_taopd.diagnostics.libraries import library
from megatron_taopd.diagnostics.markdown import to_markdown
from megatron_taopd.diagnostics.plots import draw_all
from megatron_taopd.errors import ConfigError

JSON_FILE, MARKDOWN_FILE = "report.json", "report.md"


def write_report(config: ReportConfig) -> dict[str, Any]:
    """Write the report's files; returns what report.json holds.

    Raises:
        ConfigError: the bank has not this K, one prompt only, or a library is missing.
        DataError: the bank or a gain file cannot be used.
    """
    for name in ("matplotlib.figure", "pandas", "scipy.stats", "statsmodels.api", "tabulate"):
        library(name)
    bank = open_bank(config.bank)
    gains = _read_gains(config, bank)
    report = defined(analyse(bank, gains, config))
    directory = Path(config.output)
    directory.mkdir(parents=True, exist_ok=True)
    report["plots"] = draw_all(report, bank, gains, directory)
    _write(directory / MARKDOWN_FILE, to_markdown(report))
    _write(directory / JSON_FILE, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return report


def _read_gains(config: ReportConfig, bank: Bank) -> list[Gain]:
    gains = []
    for word in config.gain:
        name, equals, path = word.partition("=")
        named = bool(equals) and not Path(word).exists()
        gains.append(read_gain(path if named else word, bank, name=name if named else None))
    names = [gain.name for gain in gains]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--gain: {names.count(name)} checkpoints are called {name}; write --gain NAME=FILE")
    return gains


def defined(value: Any) -> Any:
    """The same with None for numbers that are not defined, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: defined(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [defined(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
