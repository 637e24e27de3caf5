"""Memory of a rank by part (bytes)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_taopd.models.hf_config import HFModelConfig
from megatron_taopd.plan.activations import activation_bytes, hidden_bytes, working_bytes
from megatron_taopd.plan.config import PlanConfig
from megatron_taopd.plan.parameters import RankParameters, rank_parameters, stage_layers
from megatron_taopd.platform.layout import ParallelConfig

_BYTES = {"bf16": 2, "fp32": 4}
_STATISTICS_BUFFERS, _LOSS_BUFFERS = 5, 3
"""On a GPU, where passes go over whole tiles: both models' logits, and three and one buffer of scratch.

``jsd`` has four in all and the ``topk_`` losses about eight; tests/losses counts them on CPU, with blocks as large as a
chunk."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What the student's training keeps (bytes)."""

    parameters: int
    gradients: int
    optimizer: int


def train_state(
    rank: RankParameters, *, bf16: bool, replicas: int, expert_replicas: int, distributed_optimizer: bool
) -> TrainState:
    """Weights, DDP's fp32 gradient buffers, and Adam's state (with fp32 main weights beside bf16 ones).

    Args:
        replicas: ranks that hold the same dense weights: DP x CP.
        expert_replicas: ranks that hold the same experts.
    """
    state = 12 if bf16 else 8
    shares = (replicas, expert_replicas) if distributed_optimizer else (1, 1)
    return TrainState(
        parameters=rank.total * (2 if bf16 else 4),
        gradients=rank.total * 4,
        optimizer=state * rank.dense // shares[0] + state * rank.experts // shares[1],
    )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Parts of a rank's memory (bytes). Those of a phase are not there in the others."""

    parameters: int
    gradients: int
    optimizer: int
    teacher: int
    """Teacher's weights in the scoring phase, its LM head included."""
    teacher_in_training: int
    """Those that stay outside scoring."""
    teacher_hidden: int
    """Final hidden states of the teacher, held until they are read."""
    activations: int
    """Of the training forward, all micro-batches in flight."""
    working: int
    """Largest tensors of a layer while it runs."""
    statistics_chunks: int
    """Scoring's buffers of fp32 logits."""
    loss_chunks: int
    """The loss's buffers of fp32 logits."""
    head_gradient: int
    """The LM head's fp32 gradient, which is made beside DDP's buffer."""
    kv_cache: int
    fp8_heads: int
    """Both LM heads in FP8, beside those in the models' format."""
    fp8_heads_in_rollout: int
    """The teacher's; the student's is made anew after each optimizer step."""
    logits_not_held: int
    """What logits of both models at every response position of a replica's step would take, in fp32; not held."""

    @property
    def phases(self) -> dict[str, int]:
        """Bytes of each phase."""
        always = self.parameters + self.gradients + self.optimizer
        return {
            "rollout": always + self.teacher_in_training + self.kv_cache + self.fp8_heads_in_rollout + self.working,
            "score": always
            + self.teacher
            + self.teacher_hidden
            + self.fp8_heads
            + self.statistics_chunks
            + self.working,
            "train": always
            + self.teacher_in_training
            + self.teacher_hidden
            + self.activations
            + self.loss_chunks
            + self.head_gradient
            + self.fp8_heads
            + self.working,
        }

    @property
    def peak(self) -> int:
        """Of the phase that takes most."""
        return max(self.phases.values())

    def as_dict(self) -> dict[str, object]:
        """For a file."""
        return asdict(self) | {"phases": self.phases, "peak": self.peak}


def padded_vocab(*models: HFModelConfig, tensor: int) -> int:
    """Rows of embedding and head, as ``models.pad_vocab_size``."""
    step = 128 * tensor
    return -(-max(hf.vocab_size for hf in models) // step) * step


def stage_memory(config: PlanConfig, student: HFModelConfig, teacher: HFModelConfig, *, stage: int) -> Memory:
    """Memory of each rank of the student's stage; the teacher's is that of its largest stage if it has other stages."""
    parallel = config.parallel
    own = config.teacher_parallel.resolve(parallel)
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    padded = padded_vocab(student, teacher, tensor=tensor)
    rank = rank_parameters(student, parallel, stage=stage, padded_vocab_size=padded)
    state = train_state(
        rank,
        bf16=config.bf16,
        replicas=config.num_gpus // (tensor * stages),
        expert_replicas=config.num_gpus // parallel.expert_parallel_size,
        distributed_optimizer=config.use_distributed_optimizer,
    )
    last, size = stage == stages - 1, 2 if config.bf16 else 4
    weights, staying = _teacher_bytes(config, teacher, own, stage=stage, padded=padded, last=last)
    replicas = config.num_gpus // parallel.model_parallel_size
    responses = config.global_batch_size // replicas
    rows = responses * config.max_response_length // parallel.context_parallel_size
    teacher_size = 4 if (config.teacher_dtype or ("bf16" if config.bf16 else "fp32")) == "fp32" else 2
    waiting = rows if not config.offload_teacher_hidden else config.micro_batch_size * config.max_response_length
    kv_heads = -(-student.num_kv_heads // tensor)
    # The last token of a response is not read any more.
    cached = min(config.rollout_batch_size, -(-responses // parallel.context_parallel_size)) * (config.length - 1)
    fp8_heads = [
        padded // tensor * (hf.hidden_size + 4) if last and config.score_head_precision == "fp8" else 0
        for hf in (student, teacher)
    ]
    micro_batches = responses // config.micro_batch_size
    return Memory(
        parameters=state.parameters,
        gradients=state.gradients,
        optimizer=state.optimizer,
        teacher=weights,
        teacher_in_training=staying,
        # Under sequence parallelism the rows are gathered, so that every rank of the last stage has all of them.
        teacher_hidden=waiting * teacher.hidden_size * teacher_size if last else 0,
        activations=activation_bytes(
            student,
            parallel,
            config.recompute,
            stage=stage,
            tokens=config.micro_batch_size * config.length,
            in_flight=_in_flight(parallel, stage, micro_batches),
            size=size,
        ),
        working=max(
            working_bytes(student, parallel, tokens=config.micro_batch_size * config.length, size=size),
            working_bytes(teacher, own or parallel, tokens=config.micro_batch_size * config.length, size=teacher_size),
        )
        + hidden_bytes(student, parallel, tokens=config.micro_batch_size * config.length, size=size),
        statistics_chunks=_STATISTICS_BUFFERS * config.logits_chunk_bytes if last else 0,
        loss_chunks=_LOSS_BUFFERS * config.logits_chunk_bytes if last else 0,
        head_gradient=padded // tensor * student.hidden_size * 4 if last else 0,
        kv_cache=2 * cached * kv_heads * student.head_dim * size * len(stage_layers(student, parallel, stage)),
        fp8_heads=sum(fp8_heads),
        fp8_heads_in_rollout=fp8_heads[1],
        logits_not_held=2 * rows * (padded // tensor) * 4 if last else 0,
    )


def _in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> float:
    """Micro-batches between forward and backward on a stage, in parts where it holds several virtual stages."""
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    if virtual is None:
        return min(micro_batches, stages - stage)
    # Megatron's interleaved schedule counts one virtual stage of one micro-batch each.
    warm_up = 2 * (stages - stage - 1) + (virtual - 1) * stages
    return min(micro_batches * virtual, warm_up + 1) / virtual


def _teacher_bytes(
    config: PlanConfig, teacher: HFModelConfig, own: ParallelConfig | None, *, stage: int, padded: int, last: bool
) -> tuple[int, int]:
    """While it scores, and outside."""
    dtype = config.teacher_dtype or ("bf16" if config.bf16 else "fp32")
    size = _BYTES.get(dtype, 2)
    matrices = 1 if dtype == "fp8" else size

    def weigh(rank: RankParameters) -> int:
        return (rank.layers + rank.experts) * matrices + rank.vocabulary * size

    head = padded // config.parallel.tensor_model_parallel_size * teacher.hidden_size * size if last else 0
    if own is None:
        weights = weigh(rank_parameters(teacher, config.parallel, stage=stage, padded_vocab_size=padded))
    else:
        rows = padded_vocab(teacher, tensor=own.tensor_model_parallel_size)
        of_stages = [
            rank_parameters(teacher, own, stage=place, padded_vocab_size=rows)
            for place in range(own.pipeline_model_parallel_size)
        ]
        # Its own model has no head; the head is cut like the student's.
        without_head = [weigh(r) - (0 if teacher.tied and len(of_stages) == 1 else r.head * size) for r in of_stages]
        weights = max(without_head) + head
    return weights, head if config.offload_teacher else weights
