"""``taopd score``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_taopd.cli import parse
from megatron_taopd.commands.common import announce, last_rank_progress, ranks
from megatron_taopd.config import ScoreConfig

if TYPE_CHECKING:
    from megatron_taopd.data.batches import MicroBatch
    from megatron_taopd.data.records import Rollout
    from megatron_taopd.training.pair import ModelPair
    from megatron_taopd.training.scoring import RowReader, ScoredRows


def score(words: Sequence[str]) -> None:
    """Statistics, scores and keep mask of recorded rollouts."""
    config: ScoreConfig = parse(ScoreConfig, words, name="score")
    with ranks(config.parallel, seed=config.seed):
        run_scoring(config)


def run_scoring(config: ScoreConfig) -> None:
    """Score as configured; process groups exist."""
    from megatron_taopd.data.records import read_rollouts
    from megatron_taopd.ops.triton_statistics import check_statistics_kernel
    from megatron_taopd.platform import device
    from megatron_taopd.training.pair import load_pair
    from megatron_taopd.training.scoring import RowReader, check_score_head, score_in_groups

    announce(config, "taopd score")
    check_statistics_kernel(config.statistics_kernel, k=config.selection.support_k, device_type=device().type)
    check_score_head(config.score_head, config.compared)
    pair = load_pair(
        config.models,
        config.parallel,
        config.precision,
        train_student=False,
        teacher_parallel=config.teacher_parallel,
        teacher_fp8=config.teacher_fp8,
    )
    rollouts = read_rollouts(
        config.rollout_data,
        vocab_size=pair.vocab_size,
        max_response_length=config.max_response_length,
        teachers=pair.given_names,
    )
    micro_batches = _micro_batches(config, pair, rollouts)
    reader = RowReader.from_config(
        pair,
        config.selection,
        temperature=config.temperature,
        logits_chunk_bytes=config.logits_chunk_bytes,
        compile_statistics=config.compile_statistics,
        statistics_kernel=config.statistics_kernel,
        score_head=config.score_head,
    )
    if config.compared:
        _compare(config, reader, micro_batches, rollouts)
        return
    scored = score_in_groups(reader, micro_batches, group_size=_group_size(config), progress=last_rank_progress())
    _write_table(config, scored, rollouts)


def _micro_batches(config: ScoreConfig, pair: ModelPair, rollouts: list[Rollout]) -> list[MicroBatch]:
    """This replica's share."""
    from megatron_taopd.training.batching import replica_micro_batches
    from megatron_taopd.training.sources import even_share

    place = even_share(len(rollouts))
    return replica_micro_batches(
        rollouts[place],
        config.parallel,
        config.packing,
        micro_batch_size=config.micro_batch_size,
        sample_offset=place.start,
        teacher_names=pair.teacher_names,
    )


def _group_size(config: ScoreConfig) -> int:
    return 8 * config.parallel.pipeline_model_parallel_size


def _write_table(config: ScoreConfig, scored: ScoredRows | None, rollouts: list[Rollout]) -> None:
    """All ranks call it."""
    from megatron_taopd.training.score_table import gather_score_table, write_score_table
    from megatron_taopd.training.scoring import select_rows

    table = None
    if scored is not None:
        selection = select_rows(scored, config.selection, seed=config.seed, step=0)
        table = gather_score_table(scored, selection, rollouts)
    if table is not None:
        write_score_table(table, config.output)
        kept, rows = sum(table["keep"].to_pylist()), table.num_rows
        print(f"> {rows} response positions, {kept} kept ({kept / rows:.2%}): {config.output}", flush=True)


def _compare(config: ScoreConfig, reader: RowReader, micro_batches: list[MicroBatch], rollouts: list[Rollout]) -> None:
    """The table by the models' own heads, and how other heads would have chosen. All ranks call it."""
    from megatron_taopd.training.head_comparison import (
        OF_PRECISION,
        REFERENCE,
        ComparingReader,
        collect_by_head,
        compare_heads,
        comparison_table,
    )
    from megatron_taopd.training.scoring import read_in_groups

    heads = (REFERENCE, *(name for precision in config.compared for name in OF_PRECISION[precision]))
    parts = read_in_groups(
        ComparingReader(reader=reader, heads=heads),
        micro_batches,
        group_size=_group_size(config),
        progress=last_rank_progress(),
    )
    by_head = collect_by_head(micro_batches, parts, heads)
    _write_table(config, by_head.get(REFERENCE), rollouts)
    result = compare_heads(by_head, config.selection, seed=config.seed) if by_head else None
    if result is not None:
        _write_comparison(config, result)
        print(f"> against the models' own heads, --keep-ratio {config.selection.keep_ratio}: {config.compared_output}")
        print(comparison_table(result), flush=True)


def _write_comparison(config: ScoreConfig, result: dict[str, Any]) -> None:
    from megatron_taopd.config_file import flat_values

    path = Path(config.compared_output)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({**result, "settings": flat_values(config)}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
