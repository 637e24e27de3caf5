"""A run's record: one small JSON file, from which the table is made."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from megatron_taopd.errors import ConfigError, DataError

FORMAT = 1
NAME = "record.json"
BEGUN = "begun.json"


def write_json(path: Path, content: Any) -> None:
    """Write JSON; numbers that are not finite become null, so that any reader takes it."""
    write_text(path, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Aside first and then by rename; several processes may do it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a run that ended, well or not; None where it did not end.

    Raises:
        DataError: it is of another format.
    """
    path = directory / NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); delete the directory and the run is made again") from error
    if record.get("format") != FORMAT:
        raise DataError(f"{path} has format {record.get('format')}, and this version reads {FORMAT}")
    return record


def check_same(record: dict[str, Any], wanted: dict[str, Any], directory: Path) -> None:
    """Refuse a finished run that was made with other settings, data or models.

    Args:
        record: of the finished run.
        wanted: :meth:`Plan.identity` of the run as the suite file has it now. A key or model that the record has not
            was unknown to the version that wrote it, and is passed over; a set that the run was not measured on counts.

    Raises:
        ConfigError: naming the first differences.
    """
    differences = differing(record, wanted)
    if differences:
        more = f" (and {len(differences) - 4} more)" if len(differences) > 4 else ""
        raise ConfigError(
            f"{directory} is finished and was made with other settings: {'; '.join(differences[:4])}{more}. Delete "
            "that directory to make the run again, change the suite file back, or give another --out"
        )


def differing(made: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """In words, what settings, data and models a run was made with and is now to be made with."""
    differences = []
    for key, value in _plain(wanted["settings"]).items():
        if key in made["settings"] and made["settings"][key] != value:
            differences.append(f"{key} was {made['settings'][key]!r} and is now {value!r}")
    for name, digest in wanted["files"].items():
        if name not in made["files"]:
            differences.append(f"it was not measured on {name}")
        elif made["files"][name] != digest:
            differences.append(f"the content of {name} has changed")
    known = made.get("models", {})
    for name, digest in wanted["models"].items():
        if known.get(name, digest) != digest:
            differences.append(f"the {name} has other weights")
    return differences


def begin(directory: Path, wanted: dict[str, Any], *, anew: bool) -> bool:
    """Make a run's directory ready, with what it is made from in ``begun.json``.

    Args:
        anew: it is not to be continued.

    Returns:
        Whether an interrupted run is there that can be continued.
    """
    path = directory / BEGUN
    begun = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    goes_on = begun is not None and not anew and not differing(begun, wanted)
    if not goes_on:
        for name in ("checkpoints", "hf", "held_out", "validation"):
            shutil.rmtree(directory / name, ignore_errors=True)
        for name in ("metrics.jsonl", "starts.jsonl", "warnings.jsonl", "log.txt", NAME):
            (directory / name).unlink(missing_ok=True)
        for error in directory.glob("error-rank*.txt"):
            error.unlink()
    write_json(path, wanted)
    return goes_on
