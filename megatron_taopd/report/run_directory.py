"""What ``taopd train`` left in its ``--log-dir``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_taopd.data import jsonl
from megatron_taopd.errors import DataError


@dataclass(kw_only=True)
class RunDirectory:
    """A run, read."""

    path: Path
    metrics: list[dict[str, float]]
    """An object an iteration, in order."""
    config: dict[str, Any]
    starts: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    torn: bool = False
    """Whether the last line of the metrics was cut off, as a killed run leaves it."""

    def names(self) -> list[str]:
        """Names of all metrics, in order of appearance."""
        return list(dict.fromkeys(name for line in self.metrics for name in line))

    def series(self, name: str) -> list[float]:
        """A metric a recorded iteration; NaN where an iteration does not have it."""
        return [line.get(name, math.nan) for line in self.metrics]

    @property
    def iterations(self) -> list[float]:
        return self.series("iteration")


def read_run(path: str | Path) -> RunDirectory:
    """Read a run's directory.

    Raises:
        DataError: ``metrics.jsonl`` or ``config.yaml`` is missing or malformed.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"--log-dir {path} is no directory; give the --log-dir of a `taopd train`")
    metrics, torn = _read_metrics(path / "metrics.jsonl")
    return RunDirectory(
        path=path,
        metrics=metrics,
        config=_read_config(path / "config.yaml"),
        starts=_read_lines(path / "starts.jsonl", "starts"),
        warnings=_read_lines(path / "warnings.jsonl", "warnings"),
        torn=torn,
    )


def _read_metrics(path: Path) -> tuple[list[dict[str, float]], bool]:
    if not path.is_file():
        raise DataError(f"{path} is missing; a run writes it with --log-dir, from its first step on")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    torn = bool(lines) and not _is_json(lines[-1])
    metrics: list[dict[str, float]] = []
    for number, line in enumerate(lines[: len(lines) - torn], start=1):
        where = f"{path}:{number}"
        values = {name: _as_number(value, where, name) for name, value in jsonl.parse_object(line, where).items()}
        if "iteration" not in values:
            raise DataError(f"{where}: 'iteration' is missing; is this the metrics.jsonl of `taopd train`?")
        if metrics and values["iteration"] <= metrics[-1]["iteration"]:
            raise DataError(
                f"{where}: iteration {values['iteration']:.0f} comes after {metrics[-1]['iteration']:.0f}; two runs "
                "wrote into one directory"
            )
        metrics.append(values)
    if not metrics:
        raise DataError(f"{path} has no complete line: the run has not finished a step, and there is nothing to report")
    return metrics, torn


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _as_number(value: Any, where: str, name: str) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, int | float):
        raise DataError(f"{where}: '{name}' must be a number, not {value!r}")
    return float(value)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}, the run's configuration: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} must be a mapping of flags to values, not {type(config).__name__}")
    return {str(name): value for name, value in config.items()}


def _read_lines(path: Path, what: str) -> list[dict[str, Any]]:
    if not path.is_file() or not path.stat().st_size:
        return []
    return [line for _, line in jsonl.read_objects(path, what=what)]
