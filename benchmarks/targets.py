"""What was aimed at, held against the tables of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from common import Table


def targets_table(tables: Sequence[Table]) -> Table:
    """A line a target and shape; a target that nothing measured has no line."""
    rows = [
        row
        for find in (_score, _loss, _growth, _wire, _step, _rollout, _convert)
        for table in tables
        for row in find(table)
    ]
    return Table(
        name="targets",
        title="Targets",
        columns={"target": "target", "where": "where", "limit": "limit", "value": "measured", "met": "met"},
        rows=rows,
    )


def _row(target: str, where: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> dict:
    met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    limits = [f"≥ {at_least:g}"] if at_least is not None else []
    limits += [f"≤ {at_most:g}"] if at_most is not None else []
    return {"target": target, "where": where, "limit": ", ".join(limits), "value": value, "met": met}


def _shape(table: Table) -> str:
    return table.title.split(": ", 1)[1]


def _score(table: Table) -> Iterator[dict]:
    if not table.name.startswith("score/"):
        return
    ours = table.rows[0]
    for key, floor in (("ratio_same_chunk", "our chunk"), ("ratio_best_floor", "their best chunk")):
        yield _row(f"statistics ÷ both products ({floor})", _shape(table), ours[key], at_most=1.15)


def _loss(table: Table) -> Iterator[dict]:
    if not table.name.startswith("loss/"):
        return
    where, lines = _shape(table), {row["contender"]: row for row in table.rows}
    for name in ("ours, ρ = 0.05", "ours, ρ = 0.05, with scoring of all rows"):
        if name in lines:
            yield _row(f"{name} ÷ dense torch: time", where, lines[name]["best_ratio"], at_most=0.45)
            if "tensors_mib" in lines[name]:
                for kind in ("resident", "tensors"):
                    value = lines[name][f"{kind}_mib_ratio"]
                    yield _row(f"{name} ÷ dense torch: memory ({kind})", where, value, at_most=0.05)
    dense = lines.get("ours, ρ = 1")
    for name, peer in lines.items():
        if dense is None or not name.startswith("Liger compiled"):
            continue
        yield _row(f"ours, ρ = 1 ÷ {name}: time", where, dense["best"] / peer["best"], at_most=0.7)
        if "tensors_mib" in dense:
            for kind in ("resident", "tensors"):
                value = dense[f"{kind}_mib"] / peer[f"{kind}_mib"]
                yield _row(f"ours, ρ = 1 ÷ {name}: memory ({kind})", where, value, at_most=0.7)


def _growth(table: Table) -> Iterator[dict]:
    if table.name != "growth":
        return
    lines = {(row["phase"], row["axis"]): row["memory_per_unit"] for row in table.rows}
    for (phase, axis), bytes_a_position in lines.items():
        if axis == "T at 2 V" and (phase, "T") in lines:
            value = bytes_a_position / lines[phase, "T"]
            yield _row(f"{phase}: bytes a position, 2 V ÷ V", _shape(table), value, at_least=0.95, at_most=1.05)


def _wire(table: Table) -> Iterator[dict]:
    if not table.name.startswith("tp/"):
        return
    for row in table.rows:
        if row["ranks"] == 2:
            target = f"{row['phase']}: bytes on the wire ÷ formula, TP 2"
            where = f"{row['shape']}, K {row['k']}"
            yield _row(target, where, row["ratio"], at_least=0.9, at_most=1.1)


def _step(table: Table) -> Iterator[dict]:
    if table.name != "step":
        return
    for row in table.rows:
        if row["contender"].startswith("ours") and row["ratio"] is not None:
            where = f"{row['processes']} process(es)"
            yield _row(f"whole step, tokens/s ÷ faster TRL: {row['contender']}", where, row["ratio"], at_least=1.5)


def _rollout(table: Table) -> Iterator[dict]:
    if table.name != "rollout":
        return
    for row in table.rows:
        where = f"{row['case']}, {row['batch']} responses"
        yield _row("rollout, tokens/s ÷ transformers' generate", where, row["ratio"], at_least=1.0)


def _convert(table: Table) -> Iterator[dict]:
    if table.name != "convert":
        return
    for row in table.rows[1:]:  # the first is the copy of a file
        yield _row(f"{row['what']}: peak memory, GB", f"{row['size_gb']} GB", float(row["peak_gb"]), at_most=0.8)
