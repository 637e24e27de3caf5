"""Score tables of ``taopd score``, and the figures of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_taopd.data import jsonl
from megatron_taopd.errors import ConfigError, DataError
from megatron_taopd.report.scales import number

NUMBERS = ("D", "C", "H", "kl_forward", "D_norm", "C_norm", "H_norm", "score")


@dataclass(kw_only=True)
class ScoreTable:
    """Columns of a table; all of one length, a row a response position."""

    name: str
    path: Path
    ids: list[str]
    """Response of each row; rows of a response are neighbours."""
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    @property
    def keep(self) -> np.ndarray:
        return self.columns["keep"]


def read_score_table(flag: str) -> ScoreTable:
    """Read ``FILE`` or ``NAME=FILE``; the name is the file's stem if none is given.

    Raises:
        ConfigError: the ending is neither .parquet nor .jsonl.
        DataError: the file is missing or is no score table.
    """
    name, path = _named(flag)
    if path.suffix not in (".parquet", ".jsonl"):
        raise ConfigError(f"--score-table {path} must end in .parquet or .jsonl, as `taopd score` writes it")
    if not path.is_file():
        raise DataError(f"--score-table {path} is missing; `taopd score --output` writes one")
    wanted = ("id", "position", "token_id", "keep", *NUMBERS)
    raw = _parquet(path, wanted) if path.suffix == ".parquet" else _jsonl(path, wanted)
    if not raw["id"]:
        raise DataError(f"--score-table {path} has no rows")
    columns = {column: np.asarray(raw[column], dtype=float) for column in NUMBERS}
    columns |= {column: np.asarray(raw[column], dtype=int) for column in ("position", "token_id")}
    columns["keep"] = np.asarray(raw["keep"], dtype=bool)
    return ScoreTable(name=name, path=path, ids=[str(i) for i in raw["id"]], columns=columns)


def _named(flag: str) -> tuple[str, Path]:
    name, equals, path = flag.partition("=")
    if equals and not Path(flag).exists():
        return name, Path(path)
    return Path(flag).stem, Path(flag)


def _parquet(path: Path, wanted: Sequence[str]) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
        _check_columns(path, names, wanted)
        return pq.read_table(path, columns=list(wanted)).to_pydict()
    except pa.ArrowInvalid as error:
        raise DataError(f"--score-table {path} is no parquet file: {error}") from error


def _jsonl(path: Path, wanted: Sequence[str]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    for where, line in jsonl.read_objects(path, what="score table"):
        _check_columns(Path(where), list(line), wanted)
        for name in wanted:
            columns[name].append(line[name])
    return columns


def _check_columns(path: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise DataError(
            f"--score-table {path} has no {', '.join(missing)}; a score table of `taopd score` has the columns of "
            "docs/file_formats.md"
        )


def table_facts(table: ScoreTable) -> list[tuple[str, str]]:
    """The figures above the plots of a table."""
    keep, kl, c = table.keep, table["kl_forward"], table["C"]
    return [
        ("positions", number(len(table))),
        ("responses", number(len(set(table.ids)))),
        ("kept", f"{number(int(keep.sum()))} ({number(float(keep.mean()), 'percent')})"),
        ("mean KL(teacher ‖ student)", f"{number(float(np.nanmean(kl)))} nats"),
        ("the same at kept positions", f"{number(float(np.nanmean(kl[keep]))) if keep.any() else '–'} nats"),
        ("share of all KL that lies there", number(float(np.nansum(kl[keep]) / max(np.nansum(kl), 1e-300)), "percent")),
        ("C, 5 % quantile", number(float(np.nanquantile(c, 0.05)))),
        ("positions with C < 0.5", number(float((c < 0.5).mean()), "percent")),
        ("positions with D < 0.1 nats", number(float((table["D"] < 0.1).mean()), "percent")),
    ]


@dataclass(kw_only=True)
class Quadrant:
    """A quarter of the plane of entropy and disagreement."""

    name: str
    share: str
    of_kept: str
    keep_ratio: str
    mean_kl: str


def quadrants(table: ScoreTable) -> list[Quadrant]:
    """Positions by whether H̃ and D̃ are below their medians."""
    h, d, keep, kl = table["H_norm"], table["D_norm"], table.keep, table["kl_forward"]
    high_h, high_d = h >= np.nanmedian(h), d >= np.nanmedian(d)
    rows = []
    for name, inside in (
        ("Q1: unsure, far", high_h & high_d),
        ("Q2: unsure, near", high_h & ~high_d),
        ("Q3: sure, far", ~high_h & high_d),
        ("Q4: sure, near", ~high_h & ~high_d),
    ):
        some = bool(inside.any())
        rows.append(
            Quadrant(
                name=name,
                share=number(float(inside.mean()), "percent"),
                of_kept=number(float(inside[keep].mean()) if keep.any() else None, "percent"),
                keep_ratio=number(float(keep[inside].mean()) if some else None, "percent"),
                mean_kl=number(float(np.nanmean(kl[inside])) if some else None),
            )
        )
    return rows


@dataclass(kw_only=True)
class SameContexts:
    """Two tables of the same positions."""

    before: str
    after: str
    kl_before: float
    kl_after: float
    positions: int

    @property
    def change(self) -> float:
        """Relative."""
        return (self.kl_after - self.kl_before) / self.kl_before if self.kl_before else math.nan


def same_contexts(tables: Sequence[ScoreTable]) -> SameContexts | None:
    """The first and the last table, if they are of the same tokens at the same positions; None otherwise."""
    if len(tables) < 2:
        return None
    first, last = tables[0], tables[-1]
    same = first.ids == last.ids and all(
        np.array_equal(first[column], last[column]) for column in ("position", "token_id")
    )
    if not same:
        return None
    return SameContexts(
        before=first.name,
        after=last.name,
        kl_before=float(np.nanmean(first["kl_forward"])),
        kl_after=float(np.nanmean(last["kl_forward"])),
        positions=len(first),
    )
