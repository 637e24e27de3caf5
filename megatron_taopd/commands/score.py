"""``taopd score``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_taopd.cli import parse
from megatron_taopd.commands.common import announce, last_rank_progress, ranks
from megatron_taopd.config import ScoreConfig


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
    from megatron_taopd.training.batching import replica_micro_batches
    from megatron_taopd.training.pair import load_pair
    from megatron_taopd.training.score_table import gather_score_table, write_score_table
    from megatron_taopd.training.scoring import RowReader, score_in_groups, select_rows
    from megatron_taopd.training.sources import even_share

    announce(config, "taopd score")
    check_statistics_kernel(config.statistics_kernel, k=config.selection.support_k, device_type=device().type)
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
    place = even_share(len(rollouts))
    parallel = config.parallel
    micro_batches = replica_micro_batches(
        rollouts[place],
        parallel,
        config.packing,
        micro_batch_size=config.micro_batch_size,
        sample_offset=place.start,
        teacher_names=pair.teacher_names,
    )
    reader = RowReader.from_config(
        pair,
        config.selection,
        temperature=config.temperature,
        logits_chunk_bytes=config.logits_chunk_bytes,
        compile_statistics=config.compile_statistics,
        statistics_kernel=config.statistics_kernel,
        score_head=config.score_head,
    )
    scored = score_in_groups(
        reader,
        micro_batches,
        group_size=8 * parallel.pipeline_model_parallel_size,
        progress=last_rank_progress(),
    )
    table = None
    if scored is not None:
        selection = select_rows(scored, config.selection, seed=config.seed, step=0)
        table = gather_score_table(scored, selection, rollouts)
    if table is not None:
        write_score_table(table, config.output)
        kept, rows = sum(table["keep"].to_pylist()), table.num_rows
        print(f"> {rows} response positions, {kept} kept ({kept / rows:.2%}): {config.output}", flush=True)
