"""A run's record: one small JSON file, from which the table is made."""

from __future__ import annotations

import json
import math
import os
import socket
from pathlib import Path
from typing import Any

from megatron_taopd.errors import ConfigError, DataError

FORMAT = 1
NAME = "record.json"


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
    """Refuse a finished run that was made with other settings or other data.

    Args:
        record: of the finished run.
        wanted: :meth:`Plan.identity` of the run as the suite file has it now. A key that the record has not was
            unknown to the version that wrote it, and is passed over; a set that the run was not measured on counts.

    Raises:
        ConfigError: naming the first differences.
    """
    differences = []
    for key, value in _plain(wanted["settings"]).items():
        if key in record["settings"] and record["settings"][key] != value:
            differences.append(f"{key} was {record['settings'][key]!r} and is now {value!r}")
    for name, digest in wanted["files"].items():
        if name not in record["files"]:
            differences.append(f"it was not measured on {name}")
        elif record["files"][name] != digest:
            differences.append(f"the content of {name} has changed")
    if differences:
        more = f" (and {len(differences) - 4} more)" if len(differences) > 4 else ""
        raise ConfigError(
            f"{directory} is finished and was made with other settings: {'; '.join(differences[:4])}{more}. Delete "
            "that directory to make the run again, change the suite file back, or give another --out"
        )
