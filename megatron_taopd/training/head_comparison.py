"""``taopd score --compare``: the same rows read by LM heads of several number formats, and what that does to selection.

The models' hidden states are made once; only the heads differ. The reference is the models' own format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.ops.head import HeadShard
from megatron_taopd.teachability import SelectionConfig, TokenStatistics, token_statistics
from megatron_taopd.training.pair import ModelPair
from megatron_taopd.training.score_table import gather_columns
from megatron_taopd.training.scoring import RowReader, ScoredRows, collect_rows, select_rows

REFERENCE = "model"
HEADS = {REFERENCE: "the model's own", "bf16": "bf16", "fp8-1": "FP8, one stage", "fp8-2": "FP8, two stages"}
"""Name of a way to read -> what a table calls it."""
OF_PRECISION = {"bf16": ("bf16",), "fp8": ("fp8-1", "fp8-2")}
"""What ``--compare`` names -> ways to read."""
DIFFERENCES = ("D", "C", "H", "kl_forward", "student_logprob", "teacher_logprob")
"""Columns whose differences are told."""


@dataclass(frozen=True, kw_only=True)
class ComparingReader:
    """Statistics of a micro-batch's rows once for each head; last-stage ranks call it together."""

    reader: RowReader
    heads: tuple[str, ...]
    """Names of :data:`HEADS`."""
    _bf16: dict[str | int, HeadShard] = field(default_factory=dict)

    @property
    def pair(self) -> ModelPair:
        """The models that are read."""
        return self.reader.pair

    def __call__(
        self, micro_batch: MicroBatch, student_hidden_RH: torch.Tensor, teacher_hidden_RH: torch.Tensor
    ) -> dict[str, TokenStatistics]:
        """By name of the head."""
        return {name: self._read(name, micro_batch, student_hidden_RH, teacher_hidden_RH) for name in self.heads}

    def _read(
        self, name: str, micro_batch: MicroBatch, student_RH: torch.Tensor, teacher_RH: torch.Tensor
    ) -> TokenStatistics:
        heads: tuple[HeadShard, HeadShard] = (self.pair.student_head(), self.pair.teacher_head(micro_batch.teacher))
        rough = None
        if name == "bf16":
            heads = (self._in_bf16("student", heads[0]), self._in_bf16(micro_batch.teacher, heads[1]))
            student_RH, teacher_RH = student_RH.bfloat16(), teacher_RH.bfloat16()
        elif name == "fp8-1":
            heads = self.pair.fp8_heads(micro_batch.teacher)
        elif name == "fp8-2":
            rough = self.pair.fp8_heads(micro_batch.teacher)
        return token_statistics(
            student_RH,
            teacher_RH,
            micro_batch.token_ids_R,
            *heads,
            rough_heads=rough,
            k=self.reader.support_k,
            temperature=self.reader.temperature,
            support_mode=self.reader.support_mode,
            logits_chunk_bytes=self.reader.logits_chunk_bytes,
            compiled=self.reader.compile_statistics,
            kernel=self.reader.statistics_kernel,
        )

    def _in_bf16(self, key: str | int, head: HeadShard) -> HeadShard:
        if key not in self._bf16:
            weight = head.weight.detach().bfloat16()
            self._bf16[key] = HeadShard(weight, head.vocab_start, head.vocab_size, head.group)
        return self._bf16[key]


def collect_by_head(
    micro_batches: Sequence[MicroBatch], parts: Sequence[dict[str, TokenStatistics]], heads: Sequence[str]
) -> dict[str, ScoredRows]:
    """Rows of all micro-batches for each head; empty off the last stage."""
    rows = {name: collect_rows(micro_batches, [part[name] for part in parts]) for name in heads}
    return {name: scored for name, scored in rows.items() if scored is not None}


def compare_heads(by_head: dict[str, ScoredRows], config: SelectionConfig, *, seed: int) -> dict[str, Any] | None:
    """Selection by each head against selection by the models' own; last-stage ranks call it together.

    Returns:
        On one rank of the job: ``positions``, ``kept`` and for each other head the figures of :func:`agreement`; None
        on the others.
    """
    columns = {name: _columns(scored, config, seed=seed) for name, scored in by_head.items()}
    reference = columns.pop(REFERENCE)
    if reference is None:
        return None
    return {
        "positions": int(reference["keep"].size),
        "kept": int(reference["keep"].sum()),
        "heads": {name: agreement(reference, other) for name, other in columns.items() if other is not None},
    }


def _columns(scored: ScoredRows, config: SelectionConfig, *, seed: int) -> dict[str, np.ndarray] | None:
    selection = select_rows(scored, config, seed=seed, step=0)
    columns = {
        "sample_index": scored.sample_index_R,
        "position": scored.position_R,
        "keep": selection.keep,
        **{name: getattr(scored.statistics, name) for name in DIFFERENCES},
    }
    return gather_columns(columns)


def agreement(reference: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float | int]:
    """How much of either selection the other one has, and how far the statistics are apart.

    Returns:
        ``kept``; ``reference_also_kept``, the share of the reference's kept positions that the other keeps;
        ``also_in_reference``, the reverse (1 where nothing is kept); ``mean_abs_X``, ``max_abs_X`` of each statistic.
    """
    ours, theirs = reference["keep"].astype(bool), other["keep"].astype(bool)
    both = int((ours & theirs).sum())
    figures: dict[str, float | int] = {
        "kept": int(theirs.sum()),
        "reference_also_kept": both / int(ours.sum()) if ours.any() else 1.0,
        "also_in_reference": both / int(theirs.sum()) if theirs.any() else 1.0,
    }
    for name in DIFFERENCES:
        apart = np.abs(reference[name].astype(np.float64) - other[name].astype(np.float64))
        figures[f"mean_abs_{name}"] = float(apart.mean()) if apart.size else 0.0
        figures[f"max_abs_{name}"] = float(apart.max()) if apart.size else 0.0
    return figures


def comparison_table(result: dict[str, Any]) -> str:
    """The figures as text: a line a head."""
    shown = ("D", "C", "H", "kl_forward")
    header = ["LM head", "kept alike", "of its own", *(f"|Δ{name}| mean, max" for name in shown)]
    lines = [header]
    for name, figures in result["heads"].items():
        shares = [f"{100 * figures[key]:.2f} %" for key in ("reference_also_kept", "also_in_reference")]
        apart = [f"{figures[f'mean_abs_{column}']:.1e}, {figures[f'max_abs_{column}']:.1e}" for column in shown]
        lines.append([HEADS[name], *shares, *apart])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
