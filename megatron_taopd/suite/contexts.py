"""The divergence of a student from its teacher on contexts that stay the same for every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_taopd.config import TrainConfig
from megatron_taopd.data.records import read_rollouts
from megatron_taopd.ops.order import distributed_quantiles
from megatron_taopd.platform import distributed
from megatron_taopd.training.batching import replica_micro_batches
from megatron_taopd.training.pair import ModelPair
from megatron_taopd.training.scoring import RowReader, ScoredRows, score_in_groups
from megatron_taopd.training.sources import even_share

MEANS = {"kl_forward": "kl_forward", "kl_reverse": "kl_reverse", "mean_D": "D", "mean_C": "C", "overlap": "overlap"}
LOW_C, LOW_QUANTILE = 0.5, 0.05


def measure_contexts(pair: ModelPair, config: TrainConfig, path: str) -> dict[str, Any]:
    """Averages over all response positions of recorded rollouts, as `taopd score` has them; all ranks call it.

    The temperature is the one of the training's statistics and loss; C and D have its ``--support-k``, exact.

    Returns:
        ``kl_forward`` and ``kl_reverse`` over the whole vocabulary (nats a token), ``mean_D``, ``mean_C``, ``C_q05``,
        ``overlap``, ``low_C_share`` (C below 0.5), ``num_tokens`` and ``num_contexts``; the same on every rank.

    Raises:
        DataError: the file is malformed, or does not fit the models.
    """
    rollouts = read_rollouts(path, vocab_size=pair.vocab_size, max_response_length=None, teachers=pair.given_names)
    place = even_share(len(rollouts))
    micro_batches = replica_micro_batches(
        rollouts[place],
        config.parallel,
        config.packing,
        micro_batch_size=config.batch.micro_batch_size,
        sample_offset=place.start,
        teacher_names=pair.teacher_names,
        alignment=config.precision.token_alignment,
    )
    reader = RowReader.from_config(
        pair,
        replace(config.selection, support_mode="exact"),
        temperature=config.scoring.resolve_temperature(config.rollout.temperature),
        logits_chunk_bytes=config.scoring.logits_chunk_bytes,
        compile_statistics=config.scoring.compile_statistics,
        statistics_kernel=config.scoring.statistics_kernel,
    )
    scored = score_in_groups(reader, micro_batches, group_size=8 * config.parallel.pipeline_model_parallel_size)
    figures = None if scored is None else (*_sums(scored), _low_quantile(scored))
    names = (*MEANS, "low_C_share", "num_tokens", "C_q05")
    total = dict(zip(names, distributed.tell_from_last_stage(figures), strict=True))
    count, quantile = total.pop("num_tokens"), total.pop("C_q05")
    means = {name: value / count for name, value in total.items()}
    return {**means, "C_q05": quantile, "num_tokens": int(count), "num_contexts": len(rollouts)}


def _sums(scored: ScoredRows) -> Sequence[float]:
    """Over the rows of all last-stage ranks, which call it together."""
    statistics = scored.statistics
    sums = [getattr(statistics, field).double().sum() for field in MEANS.values()]
    sums.append((statistics.C < LOW_C).double().sum())
    sums.append(torch.tensor(float(statistics.C.numel()), dtype=torch.float64, device=statistics.C.device))
    total = torch.stack(sums)
    torch.distributed.all_reduce(total, group=distributed.row_group())
    return total.tolist()


def _low_quantile(scored: ScoredRows) -> float:
    """Of C, over the rows of all last-stage ranks, which call it together."""
    return distributed_quantiles([scored.statistics.C], [LOW_QUANTILE], distributed.row_group())[0][0]
