"""What ``taopd suite`` left in its directory: the table, the suite file, and of each run record and metrics."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_taopd.errors import DataError
from megatron_taopd.report.run_directory import RunDirectory, read_run

FORMAT = 1


@dataclass(kw_only=True)
class SuiteDirectory:
    """A suite, read; docs/suite.md has the keys of the table."""

    path: Path
    table: dict[str, Any]
    text: str | None
    """The suite file, where it was left."""
    records: list[dict[str, Any]] = field(default_factory=list)
    runs: list[tuple[dict[str, Any], RunDirectory]] = field(default_factory=list)
    """Record and directory of the runs that trained and are behind a row of the table."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(self.table["rows"])

    @property
    def methods(self) -> list[str]:
        """Names of the methods that train, in the order of the table."""
        return list(dict.fromkeys(row["method"] for row in self.rows if row["trains"]))

    @property
    def budgets(self) -> list[float]:
        """All budgets, from the smallest."""
        return sorted({row["budget"] for row in self.rows if row["budget"] is not None})

    @property
    def budgets_or_none(self) -> list[float | None]:
        """All budgets, or None alone where no row has one."""
        return [*self.budgets] or [None]

    def rows_at(self, budget: float | None) -> list[dict[str, Any]]:
        """Rows of a budget, with those that have none; of a suite without budgets all rows."""
        return [row for row in self.rows if row["budget"] in (budget, None)]

    def runs_of(self, row: dict[str, Any]) -> list[RunDirectory]:
        """Directories of the runs behind a row."""
        return [run for record, run in self.runs if _is_of(record, row)]


def read_suite(path: str | Path) -> SuiteDirectory:
    """Read a suite's directory.

    Raises:
        DataError: there is no ``table.json``, or it is of another format.
    """
    path = Path(path)
    file = path / "table.json"
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"cannot read {file}: {error.strerror}; --suite is the --out of `taopd suite run`, and `taopd suite table` "
            "writes the table of the runs that are finished"
        ) from error
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        raise DataError(f"{file} is no table of `taopd suite` in format {FORMAT}")
    text = path / "suite.yaml"
    suite = SuiteDirectory(
        path=path,
        table=table,
        text=text.read_text(encoding="utf-8") if text.is_file() else None,
    )
    for place in sorted((path / "runs").rglob("record.json")):
        record = _read_record(place)
        suite.records.append(record)
        used = any(_is_of(record, row) for row in suite.rows) and record["status"] == "finished"
        if used and (place.parent / "metrics.jsonl").is_file():
            suite.runs.append((record, read_run(place.parent)))
    return suite


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(record, dict) or "status" not in record:
        raise DataError(f"{path} is no record of a run of `taopd suite`")
    return record


def _is_of(record: dict[str, Any], row: dict[str, Any]) -> bool:
    same = all(record.get(key) == row[key] for key in ("method", "budget", "lr"))
    return same and record.get("seed") in row["seeds"]
