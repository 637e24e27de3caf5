"""What a run leaves about itself beside its metrics: when it started and with which versions, and what it warned of."""

from __future__ import annotations

import datetime
import json
import logging
import platform
from pathlib import Path
from typing import Any

from megatron_taopd import __version__
from megatron_taopd.doctor import inspect_machine
from megatron_taopd.platform import distributed

STARTS = "starts.jsonl"
WARNINGS = "warnings.jsonl"


def record_start(log_dir: str | Path) -> None:
    """Append a line to ``starts.jsonl``: a resumed run has one a start. One rank calls it."""
    machine = inspect_machine()
    versions = {"megatron_taopd": __version__, "python": machine.python} | machine.versions
    line = {
        "time": _now(),
        "host": platform.node(),
        "world_size": distributed.world_size(),
        "versions": {name: version for name, version in versions.items() if version is not None},
        "gpus": [gpu.name for gpu in machine.gpus],
        "cpu_cores": machine.cpu_cores,
    }
    _append(Path(log_dir) / STARTS, line)


def record_warnings(log_dir: str | Path) -> None:
    """Append to ``warnings.jsonl`` what this package warns of from now on. One rank calls it."""
    package = logging.getLogger("megatron_taopd")
    package.handlers = [handler for handler in package.handlers if not isinstance(handler, WarningsFile)]
    package.addHandler(WarningsFile(log_dir))


class WarningsFile(logging.Handler):
    """Appends warnings and errors of this package to ``warnings.jsonl``."""

    def __init__(self, log_dir: str | Path) -> None:
        super().__init__(level=logging.WARNING)
        self.path = Path(log_dir) / WARNINGS

    def emit(self, record: logging.LogRecord) -> None:
        line = {
            "time": _now(),
            "level": record.levelname.lower(),
            "where": record.name.removeprefix("megatron_taopd."),
            "message": record.getMessage(),
        }
        try:
            _append(self.path, line)
        except OSError:  # a full disk must not end a run on account of a warning
            self.handleError(record)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
