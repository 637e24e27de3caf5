"""The score table: a row a response position, gathered from all ranks and written by one rank."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from megatron_taopd.data.records import Rollout
from megatron_taopd.platform import distributed
from megatron_taopd.teachability import Selection
from megatron_taopd.training.scoring import ScoredRows

STATISTIC_COLUMNS = (
    "D",
    "C",
    "C_topk",
    "H",
    "H_topk",
    "kl_forward",
    "kl_reverse",
    "student_logprob",
    "teacher_logprob",
    "teacher_entropy",
    "overlap",
    "student_mass",
    "teacher_mass",
)
SELECTION_COLUMNS = ("D_norm", "C_norm", "H_norm", "score", "keep")


def gather_score_table(scored: ScoredRows, selection: Selection, rollouts: Sequence[Rollout]) -> pa.Table | None:
    """Collect all ranks' rows, ordered by response and position; last-stage ranks call it together.

    Args:
        rollouts: the whole batch, in global order.

    Returns:
        The table on one rank of the job (first tensor-, data- and context-parallel rank), None on the others.
    """
    columns = {
        "sample_index": scored.sample_index_R,
        "position": scored.position_R,
        "token_id": scored.token_ids_R,
        **{name: getattr(scored.statistics, name) for name in STATISTIC_COLUMNS},
        **{name: getattr(selection, name) for name in SELECTION_COLUMNS},
    }
    merged = gather_columns(columns)
    if merged is None:
        return None
    ids = [rollouts[i].id for i in merged.pop("sample_index")]
    return pa.table({"id": ids, **merged})


def gather_columns(columns: dict[str, torch.Tensor]) -> dict[str, np.ndarray] | None:
    """All ranks' rows, ordered by their ``sample_index`` and ``position``; last-stage ranks call it together.

    Returns:
        The columns on one rank of the job (first tensor-, data- and context-parallel rank), None on the others.
    """
    local = {name: tensor.cpu().numpy() for name, tensor in columns.items()}
    group = distributed.row_group()
    writer = group.rank() == 0
    parts: list[dict[str, np.ndarray]] | None = [{}] * group.size() if writer else None
    torch.distributed.gather_object(local, parts, dst=torch.distributed.get_process_group_ranks(group)[0], group=group)
    if parts is None or distributed.tensor_parallel_rank() != 0:
        return None
    merged = {name: np.concatenate([part[name] for part in parts]) for name in local}
    order = np.lexsort((merged["position"], merged["sample_index"]))
    return {name: values[order] for name, values in merged.items()}


def write_score_table(table: pa.Table, path: str | Path) -> None:
    """Write ``.parquet`` or ``.jsonl``, aside first and then by rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, partial)
    else:
        with partial.open("w", encoding="utf-8") as file:
            for row in table.to_pylist():
                file.write(json.dumps(row) + "\n")
    os.replace(partial, path)
