"""Both models read the contexts of a bank: statistics for several K from one pass, or the divergences alone.

R rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.data.records import Rollout
from megatron_taopd.diagnostics.bank import SHARED_COLUMNS, SUPPORT_COLUMNS
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.run_config import PackingConfig
from megatron_taopd.teachability import Support, TokenStatistics, statistics_by_support
from megatron_taopd.training.batching import replica_micro_batches
from megatron_taopd.training.pair import ModelPair
from megatron_taopd.training.score_table import gather_columns
from megatron_taopd.training.scoring import read_in_groups
from megatron_taopd.training.sources import even_share

Columns = dict[str, torch.Tensor]
Check = Callable[[Columns], None]


@dataclass(frozen=True, kw_only=True)
class ColumnReader:
    """Columns of a micro-batch's rows from both models' hidden states."""

    pair: ModelPair
    supports: Sequence[Support]
    make_columns: Callable[[dict[Support, TokenStatistics]], Columns]
    temperature: float
    logits_chunk_bytes: int

    def __call__(
        self, micro_batch: MicroBatch, student_hidden_RH: torch.Tensor, teacher_hidden_RH: torch.Tensor
    ) -> Columns:
        """Columns [R]."""
        by_support = statistics_by_support(
            student_hidden_RH,
            teacher_hidden_RH,
            micro_batch.token_ids_R,
            self.pair.student_head(),
            self.pair.teacher_head(micro_batch.teacher),
            supports=self.supports,
            temperature=self.temperature,
            logits_chunk_bytes=self.logits_chunk_bytes,
        )
        places = {
            "sample_index": micro_batch.sample_index_R,
            "position": micro_batch.position_R,
            "token_id": micro_batch.token_ids_R,
        }
        return {name: values.int() for name, values in places.items()} | self.make_columns(by_support)


def bank_reader(
    pair: ModelPair, support_k: Sequence[int], *, temperature: float, logits_chunk_bytes: int
) -> ColumnReader:
    """Reads the columns of ``positions.parquet``."""

    def make_columns(by_support: dict[Support, TokenStatistics]) -> Columns:
        exact = {k: by_support[k, "exact"] for k in support_k}
        columns = {name: getattr(exact[support_k[0]], name) for name in SHARED_COLUMNS}
        for k, statistics in exact.items():
            columns |= {f"{name}_k{k}": getattr(statistics, name) for name in SUPPORT_COLUMNS}
            columns[f"D_upstream_k{k}"] = by_support[k, "upstream"].D
        return columns

    return ColumnReader(
        pair=pair,
        supports=[(k, mode) for k in support_k for mode in ("exact", "upstream")],
        make_columns=make_columns,
        temperature=temperature,
        logits_chunk_bytes=logits_chunk_bytes,
    )


def divergence_reader(pair: ModelPair, *, temperature: float, logits_chunk_bytes: int) -> ColumnReader:
    """Reads both divergences, and of the teacher what tells whether it is the bank's."""

    def make_columns(by_support: dict[Support, TokenStatistics]) -> Columns:
        names = ("kl_forward", "kl_reverse", "teacher_logprob", "teacher_entropy")
        return {name: getattr(by_support[1, "exact"], name) for name in names}

    return ColumnReader(
        pair=pair,
        supports=[(1, "exact")],
        make_columns=make_columns,
        temperature=temperature,
        logits_chunk_bytes=logits_chunk_bytes,
    )


def read_contexts(
    reader: ColumnReader,
    contexts: Sequence[Rollout],
    parallel: ParallelConfig,
    packing: PackingConfig,
    *,
    micro_batch_size: int,
    check: Check | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, np.ndarray] | None:
    """Read all contexts, shared by the replicas; all ranks call it.

    Args:
        check: called on every rank with this rank's rows (none off the last stage), first after a round of
            micro-batches, then when all are read. What it raises, it raises on all ranks.

    Returns:
        Columns ordered by response and position on one rank of the job, None on the others.
    """
    place = even_share(len(contexts))
    micro_batches = replica_micro_batches(
        contexts[place],
        parallel,
        packing,
        micro_batch_size=micro_batch_size,
        sample_offset=place.start,
        teacher_names=reader.pair.teacher_names,
    )
    stages = parallel.pipeline_model_parallel_size
    done: list[Columns] = []
    for start, part in ((0, micro_batches[:stages]), (stages, micro_batches[stages:])):

        def tell(read: int, _: int, start: int = start) -> None:
            if progress is not None:
                progress(start + read, len(micro_batches))

        done += read_in_groups(reader, part, group_size=8 * stages, progress=tell)
        if check is not None:
            check(_joined(done))
    columns = _joined(done)
    return gather_columns(columns) if columns else None


def _joined(parts: Sequence[Columns]) -> Columns:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
