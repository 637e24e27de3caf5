"""Bytes that a rank sends in a step, by kind, and the link each takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_taopd.models.hf_config import HFModelConfig
from megatron_taopd.plan.config import PlanConfig
from megatron_taopd.plan.memory import padded_vocab
from megatron_taopd.plan.parameters import rank_parameters, stage_layers
from megatron_taopd.platform.layout import ParallelConfig

Phase = Literal["rollout", "score", "train"]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of messages of a step."""

    phase: Phase
    kind: str
    num_bytes: int
    """A rank sends (ring algorithms); of the first or last stage, whichever sends."""
    link: Literal["nvlink", "network"]


def step_traffic(config: PlanConfig, student: HFModelConfig, teacher: HFModelConfig) -> list[Traffic]:
    """All kinds that a step at this layout has; kinds without bytes are left out."""
    parallel = config.parallel
    own = config.teacher_parallel.resolve(parallel) or parallel
    replicas = config.num_gpus // parallel.model_parallel_size
    responses = config.global_batch_size // replicas
    tokens = responses * config.length
    size = 2 if config.bf16 else 4
    rows = responses * config.max_response_length // parallel.context_parallel_size
    teacher_replicas = config.num_gpus // own.model_parallel_size
    teacher_tokens = config.global_batch_size * config.length // teacher_replicas
    teacher_rows = config.global_batch_size * config.max_response_length // teacher_replicas
    recomputed = 1 if config.recompute.recompute_granularity == "full" else 0
    return [
        *_passes(config, student, parallel, "rollout", tokens=tokens, passes=1, size=size, whole=True),
        *_passes(config, teacher, own, "score", tokens=teacher_tokens, passes=1, size=size, who="teacher "),
        *_passes(config, student, parallel, "score", tokens=tokens, passes=1, size=size, who="student "),
        *_response_rows(
            config, teacher, own, rows=teacher_rows // own.context_parallel_size, size=size, who="teacher "
        ),
        *_response_rows(config, student, parallel, rows=rows, size=size, who="student "),
        *_named(
            config,
            "score",
            "statistics of the rows (TP)",
            (parallel.tensor_model_parallel_size - 1) * 4 * (6 * config.support_k + 10) * rows,
            parallel.tensor_model_parallel_size,
        ),
        *_passes(config, student, parallel, "train", tokens=tokens, passes=2 + recomputed, size=size),
        *_gradients(config, student, teacher),
    ]


def _named(config: PlanConfig, phase: Phase, kind: str, num_bytes: float, span: int) -> list[Traffic]:
    """``span``: ranks that a group reaches over, from its first to its last."""
    if num_bytes <= 0:
        return []
    link: Literal["nvlink", "network"] = "nvlink" if span <= config.gpus_per_node else "network"
    return [Traffic(phase=phase, kind=kind, num_bytes=round(num_bytes), link=link)]


def _response_rows(
    config: PlanConfig, hf: HFModelConfig, parallel: ParallelConfig, *, rows: int, size: int, who: str
) -> list[Traffic]:
    """Final hidden states at the response positions, which every rank gathers where the sequence is cut over TP."""
    tensor = parallel.tensor_model_parallel_size
    if not parallel.sequence_parallel:
        return []
    row = hf.hidden_size * size
    return _named(config, "score", who + "response rows (TP, SP)", rows * row * (tensor - 1) / tensor, tensor)


def _passes(
    config: PlanConfig,
    hf: HFModelConfig,
    parallel: ParallelConfig,
    phase: Phase,
    *,
    tokens: int,
    passes: int,
    size: int,
    who: str = "",
    whole: bool = False,
) -> list[Traffic]:
    """Messages of passes over a model; ``whole``: context-parallel ranks share responses, not sequences."""
    tensor, stages, context = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    mine, layers = tokens // context, stage_layers(hf, parallel, 0)
    row = mine * hf.hidden_size * size
    shares = tensor if parallel.sequence_parallel else 1
    found = _named(
        config,
        phase,
        who + ("reduce-scatter, all-gather (TP, SP)" if shares > 1 else "all-reduce (TP)"),
        # Two all-reduces a layer and pass, or as many pairs of reduce-scatter and all-gather: the same bytes.
        passes * len(layers) * 2 * 2 * row * (tensor - 1) / tensor,
        tensor,
    )
    if stages > 1:
        found += _named(config, phase, who + "hidden states (PP)", min(passes, 2) * row / shares, config.num_gpus)
    if context > 1 and not whole:
        keys = 2 * mine * hf.num_kv_heads * hf.head_dim // tensor * size
        found += _named(
            config, phase, who + "keys, values (CP)", passes * len(layers) * keys * (context - 1), tensor * context
        )
    ranks = parallel.expert_model_parallel_size
    if hf.experts is not None and ranks > 1:
        mixed = sum(hf.has_experts(layer) for layer in layers)
        copies = row / shares * hf.experts.experts_per_token * (ranks - 1) / ranks
        span = ranks * (parallel.expert_tensor_parallel_size or tensor)
        found += _named(config, phase, who + "all-to-all (EP)", passes * mixed * 2 * copies, span)
    return found


def _gradients(config: PlanConfig, student: HFModelConfig, teacher: HFModelConfig) -> list[Traffic]:
    parallel = config.parallel
    padded = padded_vocab(student, teacher, tensor=parallel.tensor_model_parallel_size)
    rank = rank_parameters(student, parallel, stage=0, padded_vocab_size=padded)
    size = 2 if config.bf16 else 4
    found = []
    for what, count, replicas in (
        (
            "gradients (DP)",
            rank.dense,
            config.num_gpus // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size),
        ),
        ("gradients of experts (DP)", rank.experts, config.num_gpus // parallel.expert_parallel_size),
    ):
        # Reduce-scatter of fp32 gradients; then an all-gather of them, or of new weights.
        each = 4 + (size if config.use_distributed_optimizer else 4)
        num_bytes = count * each * (replicas - 1) / replicas
        found += _named(config, "train", what, num_bytes, config.num_gpus // parallel.pipeline_model_parallel_size)
    return found
