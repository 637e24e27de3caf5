"""Some responses of a step token by token: statistics, scores, and which positions are kept. For reports."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_taopd.data.pieces import token_pieces
from megatron_taopd.data.records import Rollout
from megatron_taopd.platform import distributed
from megatron_taopd.training.scopes import Outcome

STATISTICS = ("D", "C", "C_topk", "H", "kl_forward", "student_logprob", "teacher_logprob", "rank_in_teacher")
SELECTION = ("D_norm", "C_norm", "H_norm", "score", "keep")


def evenly_chosen(count: int, most: int) -> list[int]:
    """Up to ``most`` of ``count`` indices, evenly spread."""
    chosen = min(count, most)
    return [i * count // chosen for i in range(chosen)]


def gather_kept_tokens(
    outcome: Outcome, rollouts: Sequence[Rollout], sample_indices: Sequence[int]
) -> list[dict[str, Any]] | None:
    """The lines of docs/file_formats.md without text, in the order of the batch, on rank 0; None on the others.

    All ranks call it.

    Args:
        outcome: of the step.
        rollouts: responses of this replica; all replicas have as many.
        sample_indices: which responses of the global batch.
    """
    lines = None
    if outcome.scored is not None and outcome.selection is not None:
        lines = _gather_on_last_stage(outcome, rollouts, sample_indices)
    lines = distributed.tell_from_last_stage(lines)
    return lines if distributed.rank() == 0 else None


def write_kept_tokens(path: Path, lines: Sequence[dict[str, Any]], tokenizer: Any | None, *, iteration: int) -> None:
    """Write the lines, with text where there is a tokenizer; aside first and then by rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for line in lines:
            text = {}
            if tokenizer is not None:
                text = {
                    "prompt": "".join(token_pieces(tokenizer, line["prompt_tokens"])),
                    "pieces": token_pieces(tokenizer, line["token_ids"]),
                }
            file.write(json.dumps({"iteration": iteration, **line, **text}, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def _gather_on_last_stage(
    outcome: Outcome, rollouts: Sequence[Rollout], sample_indices: Sequence[int]
) -> list[dict[str, Any]] | None:
    """All ranks' rows of the responses on the first rank of this row group, None on the others."""
    scored, selection = outcome.scored, outcome.selection
    assert scored is not None and selection is not None, "last-stage ranks score"
    wanted = torch.tensor(sample_indices, device=scored.sample_index_R.device)
    rows = torch.isin(scored.sample_index_R, wanted)
    columns = {
        "sample_index": scored.sample_index_R,
        "position": scored.position_R,
        **{name: getattr(scored.statistics, name) for name in STATISTICS},
        **{name: getattr(selection, name) for name in SELECTION},
    }
    local = {name: values[rows].cpu().numpy() for name, values in columns.items()}
    first = distributed.data_parallel_rank() * len(rollouts)
    own = rollouts if distributed.context_parallel_rank() == 0 else []  # a replica's ranks have the same
    responses = {first + i: rollout for i, rollout in enumerate(own) if first + i in sample_indices}
    group = distributed.row_group()
    parts: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    torch.distributed.gather_object(
        (local, responses), parts, dst=torch.distributed.get_process_group_ranks(group)[0], group=group
    )
    if parts is None:
        return None
    merged = {name: np.concatenate([columns[name] for columns, _ in parts]) for name in local}
    order = np.lexsort((merged["position"], merged["sample_index"]))
    merged = {name: values[order] for name, values in merged.items()}
    found = {index: rollout for _, some in parts for index, rollout in some.items()}
    asked = {"selector": outcome.asked.selector, "keep_ratio_asked": outcome.asked.resolved_keep_ratio}
    return [_line(index, found[index], merged, asked) for index in sorted(found)]


def _line(sample_index: int, rollout: Rollout, columns: dict[str, np.ndarray], asked: dict[str, Any]) -> dict[str, Any]:
    own = columns["sample_index"] == sample_index
    assert own.sum() == len(rollout.response_tokens), "every response position is scored by one rank"
    known = {"finish_reason": rollout.finish_reason, "teacher": rollout.extra.get("teacher")}
    return {
        "id": rollout.id,
        "sample_index": sample_index,
        **asked,
        **{name: value for name, value in known.items() if value is not None},
        "prompt_tokens": rollout.prompt_tokens,
        "token_ids": rollout.response_tokens,
        **{name: _plain(columns[name][own]) for name in (*STATISTICS, *SELECTION)},
    }


def _plain(values: np.ndarray) -> list[Any]:
    """For JSON: six significant digits, None for what is not finite."""
    if values.dtype.kind != "f":
        return values.tolist()
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
