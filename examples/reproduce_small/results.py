"""Records of a suite in one small file that can be committed, and back; plots of both regimes.

    python examples/reproduce_small/results.py pack build/reproduce_small/near/suite docs/reproduction/near.jsonl
    python examples/reproduce_small/results.py unpack docs/reproduction/near.jsonl build/reproduce_small/near/suite
    python examples/reproduce_small/results.py plot --out docs/reproduction/comparison.png \\
        near=build/reproduce_small/near/suite far=build/reproduce_small/far/suite

After `unpack`, `taopd suite run` goes on where the packed suite was, and `taopd suite table` makes its table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SUITE_FILE = "suite.yaml"
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
    packed.parent.mkdir(parents=True, exist_ok=True)
    packed.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(nest(head["common"] | own), indent=1) + "\n", encoding="utf-8")
        written += 1
    if not (suite / SUITE_FILE).exists():
        suite.mkdir(parents=True, exist_ok=True)
        (suite / SUITE_FILE).write_text(head["suite"], encoding="utf-8")
    return written


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


def plot(suites: dict[str, Path], out: Path) -> None:
    """Held-out divergence and accuracy of every row of the suites' tables, with the seeds as dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures = ("kl_forward", "accuracy")
    figure, axes = plt.subplots(len(suites), 2, figsize=(11, 0.3 + 3.4 * len(suites)), squeeze=False)
    for row, (regime, suite) in zip(axes, suites.items(), strict=True):
        table = json.loads((suite / "table.json").read_text(encoding="utf-8"))
        entries = [entry for entry in table["rows"] if entry["seeds"]]
        for axis, name in zip(row, measures, strict=True):
            for place, entry in enumerate(entries):
                measure = entry["measures"][name]
                color = {None: "black", 0.05: "tab:orange", 0.1: "tab:blue"}.get(entry["budget"], "tab:green")
                values = list(measure["values"].values())
                axis.plot(values, [place] * len(values), ".", color=color, alpha=0.5)
                axis.errorbar(measure["mean"], place, xerr=measure["half_width"] or 0.0, fmt="|", color=color, ms=12)
            labels = [e["method"] + (f" {100 * e['budget']:g} %" if e["budget"] else "") for e in entries]
            axis.set_yticks(range(len(entries)), labels if name == measures[0] else [""] * len(entries), fontsize=7)
            axis.invert_yaxis()
            axis.grid(axis="x", alpha=0.3)
            axis.set_title(f"{regime}: held-out {table['measures'][name]['title']}", fontsize=9)
        row[0].set_xscale("log")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    print(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("pack", "unpack"):
        command = commands.add_parser(name)
        command.add_argument("source", type=Path)
        command.add_argument("target", type=Path)
    command = commands.add_parser("plot")
    command.add_argument("suites", nargs="+", help="REGIME=DIRECTORY, with table.json in it")
    command.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "plot":
        plot({name: Path(path) for name, path in (word.split("=", 1) for word in args.suites)}, args.out)
        return
    count = (pack if args.command == "pack" else unpack)(args.source, args.target)
    print(f"{args.target}: {count} records")


if __name__ == "__main__":
    main()
