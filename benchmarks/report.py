"""Markdown of result files. No figure in the documentation is typed by hand:

python benchmarks/report.py build/benchmarks/results.json --docs docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
MOST_BYTES = 300_000


def markdown(tables: Sequence[dict[str, Any]], heading: str = "###") -> str:
    """All tables, with the command and the machine that made each."""
    parts: list[str] = []
    machine = None
    for table in tables:
        if table["environment"] and _machine(table["environment"]) != machine:
            machine = _machine(table["environment"])
            parts.append(machine)
        parts.append(f"{heading} {table['title']}")
        if table["command"]:
            threads, processes = (table["environment"][name] for name in ("threads", "processes"))
            parts.append(f"`{table['command']}` (threads a process: {threads}; processes: up to {processes})")
        parts.append(_table(table["columns"], table["rows"]))
        parts += table["notes"]
    return "\n\n".join(parts) + "\n"


def _machine(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return (
        f"{environment['date']}, commit {environment['commit']}; {environment['cpu']}, {environment['cores']} cores, "
        f"{environment['memory_gib']:g} GiB; Python {environment['python']}, {versions}."
    )


def _table(columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> str:
    texts = [[_text(row.get(key)) for key in columns] for row in rows]
    numeric = [all(isinstance(row.get(key), int | float | None) for row in rows) for key in columns]
    lines = [list(columns.values()), ["--:" if right else "---" for right in numeric], *texts]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def put_into(path: Path, text: str) -> None:
    """Replace what is between the two marks of a document."""
    document = path.read_text(encoding="utf-8")
    if BEGIN not in document or END not in document:
        raise SystemExit(f"{path} needs the marks {BEGIN} and {END}, between which the results go")
    before, rest = document.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def compact(tables: Sequence[dict[str, Any]]) -> str:
    """The tables as JSON; where that is long, without the samples, which no column shows."""
    text = _json(tables)
    if len(text) <= MOST_BYTES:
        return text
    return _json([{**t, "rows": [{key: row.get(key) for key in t["columns"]} for row in t["rows"]]} for t in tables])


def _json(tables: Sequence[dict[str, Any]]) -> str:
    """A line a row."""
    parts = []
    for table in tables:
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in table["rows"])
        rest = json.dumps({key: value for key, value in table.items() if key != "rows"}, ensure_ascii=False)
        parts.append(f'{rest[:-1]}, "rows": [\n{rows}\n]}}')
    return "[\n" + ",\n".join(parts) + "\n]\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON written by run.py or by one benchmark")
    parser.add_argument(
        "--docs", type=Path, default=None, help="document whose results section is replaced; the JSON goes beside it"
    )
    args = parser.parse_args()
    tables = json.loads(args.results.read_text(encoding="utf-8"))
    text = markdown(tables)
    if args.docs is None:
        print(text)
    else:
        put_into(args.docs, text)
        args.docs.with_suffix(".json").write_text(compact(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
