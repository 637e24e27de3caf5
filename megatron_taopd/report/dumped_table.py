"""The positions that a run itself wrote down, as a table, for a page that was given no score table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_taopd.data import jsonl
from megatron_taopd.errors import DataError
from megatron_taopd.report.score_tables import NUMBERS, ScoreTable


def dumped_table(log_dir: Path) -> ScoreTable | None:
    """The responses of the last kept-token dump (``--dump-kept-interval``); None where the run wrote none.

    Its normalised columns are those of the step: scaled by the quantiles of the whole batch, of which it has a part.

    Raises:
        DataError: the dump is malformed.
    """
    files = sorted((log_dir / "kept_tokens").glob("iter_*.jsonl"))
    if not files:
        return None
    raw: dict[str, list[Any]] = {name: [] for name in ("id", "position", "token_id", "keep", *NUMBERS)}
    iteration = None
    for where, line in jsonl.read_objects(files[-1], what="kept tokens"):
        ids = jsonl.token_ids(line.get("token_ids"), where, "token_ids")
        for name in ("keep", *NUMBERS):
            values = line.get(name)
            if not isinstance(values, list) or len(values) != len(ids):
                raise DataError(f"{where}: {name} must be a list with one entry a token, {len(ids)}")
            raw[name] += values
        raw["id"] += [f"{line.get('sample_index')}: {line.get('id')}"] * len(ids)  # an id may be answered twice
        raw["position"] += range(len(ids))
        raw["token_id"] += ids
        iteration = line.get("iteration")
    columns = {name: np.asarray(raw[name], dtype=float) for name in NUMBERS}
    columns |= {name: np.asarray(raw[name], dtype=int) for name in ("position", "token_id")}
    columns["keep"] = np.asarray(raw["keep"], dtype=bool)
    return ScoreTable(name=f"iteration-{iteration}", path=files[-1], ids=raw["id"], columns=columns)
