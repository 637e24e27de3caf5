"""Flags of ``taopd plan``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_taopd.errors import ConfigError
from megatron_taopd.plan.gpus import GPUS, Gpu
from megatron_taopd.platform.layout import ParallelConfig, TeacherParallelConfig
from megatron_taopd.run_config import RecomputeConfig


@dataclass(kw_only=True)
class PlanConfig:
    """Memory, traffic and least time of a training step at a layout, or the layouts that fit."""

    student: str
    """HF directory; a config.json alone in it is enough."""
    teacher: str
    """HF directory; a config.json alone in it is enough."""
    num_gpus: int = 8
    """GPUs of the run."""
    gpus_per_node: int = 8
    """GPUs that NVLink joins."""
    gpu: Literal["a100-40gb", "a100-80gb", "h100-80gb", "h200-141gb", "b200-180gb"] = "h100-80gb"
    """GPU: memory as its driver reports it, rates from the data sheet."""
    gpu_memory_gib: float | None = None
    """Memory of the GPU instead (GiB)."""
    bf16_tflops: float | None = None
    """Its dense bf16 rate instead (TFLOP/s)."""
    memory_gbps: float | None = None
    """Its memory bandwidth instead (GB/s)."""
    nvlink_gbps: float | None = None
    """Its bandwidth within the node instead (GB/s, one direction)."""
    network_gbps: float | None = None
    """Its bandwidth between nodes instead (GB/s, one direction)."""
    reserve_gib: float = 6.0
    """Memory left to CUDA, NCCL and fragments (GiB)."""
    propose: bool = False
    """Try layouts instead of the one of the flags, and list those that fit, quickest first."""
    json: str | None = None
    """Write the plan to this file as well."""
    micro_batch_size: int = 1
    """Responses a forward pass."""
    global_batch_size: int = 64
    """Responses a training step."""
    prompt_length: int = 512
    """Tokens of a prompt."""
    max_response_length: int = 4096
    """Tokens of a response; all responses are taken to be so long."""
    rollout_batch_size: int = 64
    """Responses that a replica generates together."""
    keep_ratio: float = 0.1
    """Share of the response positions that is trained on."""
    support_k: int = 16
    """Size K of the supports."""
    logits_chunk_bytes: int = 64 * 2**20
    """Memory for one chunk of fp32 logits a model and rank."""
    bf16: bool = False
    """bf16 weights and activations (default: fp32)."""
    teacher_dtype: Literal["bf16", "fp32", "fp8"] | None = None
    """Weights of the teacher (default: the student's). fp8: one byte for each weight of the layers' matrices, bf16 for
    the rest; in `train` these are --teacher-fp8-format and --teacher-fp8-param-gather."""
    score_head_precision: Literal["model", "fp8"] = "model"
    """fp8: both LM heads are there in FP8 as well, a byte a weight and 4 bytes a row."""
    offload_teacher: bool = False
    """The teacher's weights are on the GPU in the scoring phase alone."""
    offload_teacher_hidden: bool = False
    """The teacher's hidden states wait in host memory."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state and main weights over the data-parallel ranks."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    teacher_parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)

    def __post_init__(self) -> None:
        counts = ("num_gpus", "gpus_per_node", "micro_batch_size", "global_batch_size", "prompt_length")
        for name in (*counts, "max_response_length", "rollout_batch_size", "support_k", "logits_chunk_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"--keep-ratio {self.keep_ratio} must be in (0, 1]")
        for name in ("gpu_memory_gib", "bf16_tflops", "memory_gbps", "nvlink_gbps", "network_gbps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be positive")
        if not 0 <= self.reserve_gib < self.hardware.memory_gib:
            raise ConfigError(f"--reserve-gib {self.reserve_gib} must be in [0, {self.hardware.memory_gib:g})")
        if self.teacher_dtype == "fp8" and self.hardware.fp8_tflops is None:
            raise ConfigError(f"--teacher-dtype fp8: the {self.gpu} has no FP8 units; use bf16")
        if self.teacher_dtype == "fp8" and self.offload_teacher:
            raise ConfigError(
                "--teacher-dtype fp8 is --teacher-fp8-param-gather of `train`, whose weights --offload-teacher cannot "
                "move; drop one"
            )
        if self.score_head_precision == "fp8" and self.hardware.fp8_tflops is None:
            raise ConfigError(f"--score-head-precision fp8: the {self.gpu} has no FP8 units; use model")
        if self.propose and (self.parallel != ParallelConfig() or self.teacher_parallel != TeacherParallelConfig()):
            raise ConfigError("--propose tries layouts of its own, so that flags of a layout have no effect; drop them")
        if self.propose and self.recompute != RecomputeConfig():
            raise ConfigError("--propose tries recomputation on and off; drop --recompute-granularity")

    @property
    def hardware(self) -> Gpu:
        """The GPU with what the flags say of it."""
        given = {
            "memory_gib": self.gpu_memory_gib,
            "bf16_tflops": self.bf16_tflops,
            "memory_gbps": self.memory_gbps,
            "nvlink_gbps": self.nvlink_gbps,
            "network_gbps": self.network_gbps,
        }
        return replace(GPUS[self.gpu], **{name: value for name, value in given.items() if value is not None})

    @property
    def length(self) -> int:
        """Tokens of a sequence, prompt included."""
        return self.prompt_length + self.max_response_length
