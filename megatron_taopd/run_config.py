"""Flags that several sub-commands share and no room below owns: models, number formats, batch, optimizer, files.

A field's docstring is its ``--help`` text. Nothing here imports Megatron.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from megatron_taopd.errors import ConfigError
from megatron_taopd.fp8_config import Fp8Config

if TYPE_CHECKING:
    from megatron_taopd.platform.layout import ParallelConfig

_NAMED = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)=(?P<path>.+)")


@dataclass(kw_only=True)
class ModelPairConfig:
    """Student and teacher."""

    student: str
    """HF directory, or a Megatron checkpoint directory written by this project."""
    teacher: Annotated[list[str], tyro.conf.UseAppendAction]
    """HF directory, or a Megatron checkpoint directory written by this project. Several: the flag again for each, as
    NAME=DIRECTORY; the `teacher` of a prompt or rollout says which one reads it."""
    teacher_dtype: Literal["bf16", "fp32"] | None = None
    """Weights and activations of the teacher (default: the student's, see --bf16). bf16 beside an fp32 student halves
    the teacher's memory."""
    allow_stop_token_mismatch: bool = False
    """Train although student and teacher stop on different token ids (this has collapsed runs)."""

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ConfigError("--teacher is missing: the directory of the model to learn from")
        names = [name for name, _ in self.named_teachers()]
        if len(names) > 1 and None in names:
            raise ConfigError(
                f"--teacher {self.teacher[names.index(None)]} has no name beside others; write --teacher NAME=DIRECTORY"
            )
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"--teacher {name}=… is given {names.count(name)} times; names must differ")

    def named_teachers(self) -> list[tuple[str | None, str]]:
        """Name, if it was given, and directory of each teacher."""
        named: list[tuple[str | None, str]] = []
        for word in self.teacher:
            match = _NAMED.fullmatch(word)
            named.append((None, word) if match is None or Path(word).exists() else (match["name"], match["path"]))
        return named


@dataclass(kw_only=True)
class PrecisionConfig(Fp8Config):
    """Number formats."""

    bf16: bool = False
    """bf16 weights and activations for both models, with fp32 main weights in the optimizer (default: fp32)."""


def refuse_two_kernels(compile_statistics: bool, statistics_kernel: str) -> None:
    """Raises:
    ConfigError: both replace the same passes.
    """
    if compile_statistics and statistics_kernel != "torch":
        raise ConfigError(
            f"--compile-statistics has no effect with --statistics-kernel {statistics_kernel}, whose one kernel makes "
            "these passes; drop one of them"
        )


@dataclass(kw_only=True)
class ScoringConfig:
    """How both models are read."""

    distillation_temperature: float | None = None
    """Divides the logits of both models in D, C, H and the loss (default: --temperature, the one responses are
    sampled with; needed where that is 0)."""
    logits_chunk_bytes: int = 64 * 2**20
    """Memory for one chunk of fp32 logits a model and rank. Memory never grows with tokens x vocabulary."""
    compile_statistics: bool = False
    """Run the elementwise passes of scoring as one torch.compile loop: needs a C++ compiler (CPU) or Triton (GPUs)."""
    statistics_kernel: Literal["torch", "triton"] = "torch"
    """What goes over the logits of scoring: torch, pass by pass, or a Triton kernel in a single pass (CUDA only,
    --support-k to 128; 2.7 times as fast as torch on an H200, see docs/gpu.md)."""
    score_from: Literal["forward", "rollout"] = "forward"
    """Where scoring has the student's final hidden states from: a forward pass over the responses, or the generation
    itself (--rollout-engine megatron), which then keeps a row of the hidden size a token; they differ by rounding. Not
    with --fp8-format: a student in training generates without FP8."""
    offload_teacher: bool = False
    """Between scoring phases the teacher's weights wait in host memory; its LM head, which the loss needs, stays."""
    offload_teacher_hidden: bool = False
    """The teacher's hidden states wait in host memory until they are read."""

    def __post_init__(self) -> None:
        if self.distillation_temperature is not None and not self.distillation_temperature > 0:
            raise ConfigError(f"--distillation-temperature {self.distillation_temperature} must be positive")
        if self.logits_chunk_bytes < 2**16:
            raise ConfigError(f"--logits-chunk-bytes {self.logits_chunk_bytes} must be at least {2**16}")
        refuse_two_kernels(self.compile_statistics, self.statistics_kernel)

    def resolve_temperature(self, sampling_temperature: float) -> float:
        """The one temperature of statistics and loss.

        Raises:
            ConfigError: sampling is greedy and no distillation temperature is given.
        """
        if self.distillation_temperature is not None:
            return self.distillation_temperature
        if not sampling_temperature > 0:
            raise ConfigError(
                f"--temperature {sampling_temperature} samples greedily, and logits cannot be divided by it; "
                "give --distillation-temperature (1 is usual)"
            )
        return sampling_temperature


@dataclass(kw_only=True)
class BatchConfig:
    """Batch and length of the run."""

    micro_batch_size: int = 1
    """Responses a forward pass."""
    global_batch_size: int = 8
    """Responses a training step, over all data-parallel ranks."""
    train_iters: int = 10
    """Training steps in all, those of a resumed checkpoint included."""

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "global_batch_size", "train_iters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")

    def per_replica(self, parallel: ParallelConfig, replicas: int) -> int:
        """Responses a step of each data-parallel replica.

        Raises:
            ConfigError: the batch does not divide over the replicas and micro-batches, or virtual stages cannot deal
                the micro-batches.
        """
        whole, micro = self.global_batch_size, self.micro_batch_size
        if whole % (replicas * micro):
            raise ConfigError(
                f"--global-batch-size {whole} must be a multiple of --micro-batch-size {micro} x {replicas} "
                f"data-parallel replicas = {replicas * micro}"
            )
        local = whole // replicas
        virtual, stages = parallel.num_virtual_stages_per_pipeline_rank, parallel.pipeline_model_parallel_size
        if virtual is not None and local // micro % stages:
            raise ConfigError(
                f"--num-virtual-stages-per-pipeline-rank {virtual} wants a multiple of --pipeline-model-parallel-size "
                f"{stages} micro-batches, and --global-batch-size {whole} gives each of {replicas} replicas "
                f"{local // micro} of --micro-batch-size {micro}; make it a multiple of {replicas * micro * stages}"
            )
        return local


@dataclass(kw_only=True)
class PackingConfig:
    """Sequences without padding."""

    packed_sequences: bool = False
    """Lay responses end to end in one long sequence a micro-batch (default: side by side, padded to the longest).
    Positions begin anew in each and none attends to another, so that the results are the same."""
    max_packed_length: int | None = None
    """Most tokens of a packed sequence, prompts included, over all context-parallel ranks (default:
    --micro-batch-size times the longest response with its prompt)."""

    def __post_init__(self) -> None:
        if self.max_packed_length is None:
            return
        if not self.packed_sequences:
            raise ConfigError(
                f"--max-packed-length {self.max_packed_length} has no effect without --packed-sequences; set that too"
            )
        if self.max_packed_length < 1:
            raise ConfigError(f"--max-packed-length {self.max_packed_length} must be at least 1")

    def check_micro_batch_size(self, size: int) -> None:
        """Refuse two sizes of a micro-batch.

        Raises:
            ConfigError: tokens are given, and responses as well.
        """
        if self.max_packed_length is not None and size > 1:
            raise ConfigError(
                f"--micro-batch-size {size} has no effect with --max-packed-length {self.max_packed_length}, which "
                "says how large a micro-batch is; drop one of them"
            )


@dataclass(kw_only=True)
class OptimizationConfig:
    """Optimizer and schedule."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Megatron's AdamW, or SGD with momentum."""
    lr: float = 1e-6
    """Peak learning rate. Sparse budgets usually want a larger one than dense distillation."""
    min_lr: float = 0.0
    """The decay ends here."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "constant"
    """Shape of the schedule after the warm-up."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up from 0."""
    lr_decay_iters: int | None = None
    """Iterations after which the rate stays at --min-lr (default: --train-iters)."""
    weight_decay: float = 0.1
    """Decoupled weight decay; biases and norm weights have none."""
    adam_beta1: float = 0.9
    """Adam's first coefficient."""
    adam_beta2: float = 0.999
    """Adam's second coefficient."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    sgd_momentum: float = 0.9
    """Momentum of SGD."""
    clip_grad: float = 1.0
    """Clip the global gradient norm to this; 0 does not clip (the norm is logged all the same)."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state and main weights over the data-parallel ranks (Adam only)."""
    max_skipped_non_finite: int = 0
    """Leave out so many steps of the run whose loss or gradient is not finite; the next one ends it. The batch of each
    is written to non_finite/ in --log-dir (or --save)."""

    def __post_init__(self) -> None:
        if self.lr < 0 or self.min_lr < 0:
            raise ConfigError(f"--lr {self.lr} and --min-lr {self.min_lr} must not be negative")
        if self.min_lr > self.lr:
            raise ConfigError(f"--min-lr {self.min_lr} is above --lr {self.lr}; lower it")
        if self.lr_warmup_iters < 0:
            raise ConfigError(f"--lr-warmup-iters {self.lr_warmup_iters} must not be negative")
        if self.max_skipped_non_finite < 0:
            raise ConfigError(f"--max-skipped-non-finite {self.max_skipped_non_finite} must not be negative")
        if self.clip_grad < 0:
            raise ConfigError(f"--clip-grad {self.clip_grad} must be 0 (no clipping) or positive")
        if self.use_distributed_optimizer and self.optimizer != "adam":
            raise ConfigError(
                f"--use-distributed-optimizer shards Adam's state only and --optimizer is {self.optimizer!r}; "
                "use --optimizer adam or drop the flag"
            )


@dataclass(kw_only=True)
class RecomputeConfig:
    """Activation recomputation of the student, as in Megatron."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers, or Megatron's selective parts."""
    recompute_method: Literal["uniform", "block"] | None = None
    """How full recomputation cuts the layers."""
    recompute_num_layers: int | None = None
    """Layers a recomputed piece (uniform) or recomputed layers a stage (block)."""

    def __post_init__(self) -> None:
        if self.recompute_granularity == "full":
            if self.recompute_method is None or self.recompute_num_layers is None:
                raise ConfigError(
                    "--recompute-granularity full needs --recompute-method and --recompute-num-layers (uniform 1 "
                    "recomputes every layer)"
                )
        elif self.recompute_method is not None or self.recompute_num_layers is not None:
            raise ConfigError(
                "--recompute-method and --recompute-num-layers have an effect with --recompute-granularity full "
                f"only, which is {self.recompute_granularity}"
            )


@dataclass(kw_only=True)
class LoggingConfig:
    """What is told."""

    log_interval: int = 1
    """Print a line every so many iterations; metrics.jsonl always gets each."""
    log_dir: str | None = None
    """Directory for metrics.jsonl and the resolved configuration."""
    tensorboard_dir: str | None = None
    """Directory for TensorBoard events."""

    def __post_init__(self) -> None:
        if self.log_interval < 1:
            raise ConfigError(f"--log-interval {self.log_interval} must be at least 1")
