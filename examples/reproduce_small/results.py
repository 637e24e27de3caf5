"""Records of a suite in one small file that can be committed, and back; what collapsed; a plot of all regimes.

    python examples/reproduce_small/results.py pack build/reproduce_small/near/suite docs/reproduction/near.jsonl
    python examples/reproduce_small/results.py unpack docs/reproduction/near.jsonl build/reproduce_small/near/suite
    python examples/reproduce_small/results.py collapsed build/reproduce_small/near/suite near-collapse.yaml
    python examples/reproduce_small/results.py plot --out docs/reproduction/comparison.png \\
        near=build/reproduce_small/near/suite far=build/reproduce_small/far/suite

After `unpack`, `taopd suite run` goes on where the packed suite was, and `taopd suite table` makes its table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from collapse import collapsed_rows, suite_of
from plotting import plot

SUITE_FILE, TABLE = "suite.yaml", "table.json"
LEFT_OUT = ("host",)
"""The machine's name is nobody's business."""


def pack(suite: Path, packed: Path) -> int:
    """Write all records of a suite: first what all have in common, and columns; then a line a record.

    Returns:
        How many there are.
    """
    paths = sorted((suite / "runs").rglob("record.json"))
    records = [flatten(json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    columns = sorted({column for record in records for column in record} - set(LEFT_OUT))
    common = {c: records[0][c] for c in columns if all(c in r and r[c] == records[0][c] for r in records)}
    columns = [column for column in columns if column not in common]
    head = {"common": common, "columns": columns, "suite": (suite / SUITE_FILE).read_text(encoding="utf-8")}
    lines: list[dict[str, Any]] = [head]
    for path, record in zip(paths, records, strict=True):
        lines.append(
            {
                "run": str(path.parent.relative_to(suite / "runs")),
                "values": [record.get(column) for column in columns],
                "absent": [index for index, column in enumerate(columns) if column not in record],
            }
        )
    write_aside(packed, "".join(json.dumps(line) + "\n" for line in lines))
    return len(records)


def unpack(packed: Path, suite: Path) -> int:
    """Write the records of a packed suite where they were; runs that are there stay. Returns how many were written."""
    head, *lines = (json.loads(line) for line in packed.read_text(encoding="utf-8").splitlines())
    written = 0
    for line in lines:
        path = suite / "runs" / line["run"] / "record.json"
        if path.exists():
            continue
        absent = set(line["absent"])
        own = {c: line["values"][i] for i, c in enumerate(head["columns"]) if i not in absent}
        write_aside(path, json.dumps(nest(head["common"] | own), indent=1) + "\n")
        written += 1
    if not (suite / SUITE_FILE).exists():
        write_aside(suite / SUITE_FILE, head["suite"])
    return written


def write_aside(path: Path, text: str) -> None:
    """Write a file that other processes may read, or write the same, at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_collapsed(suite: Path, target: Path) -> int:
    """Write the suite file that repeats what collapsed at a smaller rate, or remove an old one where nothing did.

    Returns:
        How many rows collapsed.
    """
    import yaml

    rows = collapsed_rows(json.loads((suite / TABLE).read_text(encoding="utf-8")))
    for row in rows:
        print(f"collapsed: {row.method}{'' if row.budget is None else f' at {100 * row.budget:g} %'}: {row.why}")
    if not rows:
        target.unlink(missing_ok=True)
        return 0
    content = suite_of(yaml.safe_load((suite / SUITE_FILE).read_text(encoding="utf-8")), rows)
    write_aside(target, yaml.safe_dump(content, sort_keys=False))
    return len(rows)


def flatten(record: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested objects as one, with the keys on the way joined; an empty object is a value."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= flatten(value, f"{before}{key} > ") if isinstance(value, dict) and value else {f"{before}{key}": value}
    return flat


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """What :func:`flatten` was given."""
    record: dict[str, Any] = {}
    for name, value in flat.items():
        *way, last = name.split(" > ")
        place = record
        for key in way:
            place = place.setdefault(key, {})
        place[last] = value
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("pack", "unpack", "collapsed"):
        command = commands.add_parser(name)
        command.add_argument("source", type=Path)
        command.add_argument("target", type=Path)
    command = commands.add_parser("plot")
    command.add_argument("suites", nargs="+", help="REGIME=DIRECTORY; those without a table.json are left out")
    command.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "plot":
        named = {name: Path(path) for name, path in (word.split("=", 1) for word in args.suites)}
        made = {name: path for name, path in named.items() if (path / TABLE).is_file()}
        if not made:
            parser.error(f"none of {', '.join(map(str, named.values()))} has a {TABLE}; taopd suite table writes it")
        plot(made, args.out)
        return
    act = {"pack": pack, "unpack": unpack, "collapsed": write_collapsed}[args.command]
    count = act(args.source, args.target)
    print(f"{args.target}: {count} {'collapsed rows' if args.command == 'collapsed' else 'records'}")


if __name__ == "__main__":
    main()
