"""What the sub-commands are told: keyword-only dataclasses whose fields are the flags.

A field's docstring is its ``--help`` text. Knobs of a room (selection, loss, rollout, data, layout) live beside
the code of that room, the rest in ``run_config``; this file puts them together and checks what concerns several.
Nothing here imports Megatron.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_taopd.checkpoint_config import CheckpointConfig
from megatron_taopd.data.config import DataConfig
from megatron_taopd.errors import ConfigError
from megatron_taopd.fp8_config import ScoreHeadConfig, TeacherFp8Config
from megatron_taopd.losses import LossConfig
from megatron_taopd.monitor_config import MonitorConfig
from megatron_taopd.platform.layout import ParallelConfig, TeacherParallelConfig
from megatron_taopd.rollout.config import RolloutConfig
from megatron_taopd.rollout.openai.config import RolloutServerConfig
from megatron_taopd.run_config import (
    BatchConfig,
    LoggingConfig,
    ModelPairConfig,
    OptimizationConfig,
    PackingConfig,
    PrecisionConfig,
    RecomputeConfig,
    ScoringConfig,
    refuse_two_kernels,
)
from megatron_taopd.teachability import SelectionConfig
from megatron_taopd.teachability.phases import PhaseConfig

COMPARABLE = ("bf16", "fp8")
"""What ``taopd score --compare`` knows."""


@dataclass(kw_only=True)
class TrainConfig:
    """Distil a teacher into a student on the student's own responses."""

    models: ModelPairConfig
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rollout_server: RolloutServerConfig = field(default_factory=RolloutServerConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    phases: PhaseConfig = field(default_factory=PhaseConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    score_head: ScoreHeadConfig = field(default_factory=ScoreHeadConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    teacher_parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    teacher_fp8: TeacherFp8Config = field(default_factory=TeacherFp8Config)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = 1234
    """Seed of prompt order, sampling and the random selector."""

    def __post_init__(self) -> None:
        self.rollout_server.check_against(self.rollout, train_iters=self.batch.train_iters)
        if self.rollout.rollout_engine != "file" and self.data.prompt_data is None:
            raise ConfigError(
                f"--rollout-engine {self.rollout.rollout_engine} answers the prompts of --prompt-data, which is "
                "missing; give a JSONL file with `prompt` or `messages`, or recorded responses with --rollout-engine "
                "file --rollout-data"
            )
        if self.rollout.rollout_engine == "file" and self.data.prompt_data is not None:
            raise ConfigError(
                f"--prompt-data {self.data.prompt_data} has no effect with --rollout-engine file, whose prompts are "
                "in --rollout-data; drop one of them"
            )
        per_prompt = self.rollout.num_samples_per_prompt
        if self.batch.global_batch_size % per_prompt:
            raise ConfigError(
                f"--global-batch-size {self.batch.global_batch_size} (responses a step) must be a multiple of "
                f"--num-samples-per-prompt {per_prompt}"
            )
        self.packing.check_micro_batch_size(self.batch.micro_batch_size)
        self.scoring.resolve_temperature(self.rollout.temperature)
        self._check_fp8()
        self.phases.check_against(self.selection)
        self.monitor.check_against(self.selection, log_dir=self.logging.log_dir)
        self._check_score_from()
        self._check_importance_ratio()

    def _check_importance_ratio(self) -> None:
        kind, sampled_at = self.loss.importance_ratio, self.rollout.temperature
        if kind == "none":
            return
        if self.rollout.rollout_engine == "megatron":
            raise ConfigError(
                f"--importance-ratio {kind} has no effect with --rollout-engine megatron: the student itself writes "
                "the responses"
            )
        if sampled_at == 0:
            raise ConfigError(
                f"--importance-ratio {kind} weighs by probabilities of sampling, and --temperature 0 takes the "
                "likeliest token; drop one of them"
            )
        if self.scoring.resolve_temperature(sampled_at) != sampled_at:
            raise ConfigError(
                f"--importance-ratio {kind} compares log-probabilities at one temperature, and the student is read at "
                f"--distillation-temperature {self.scoring.distillation_temperature} while responses are sampled at "
                f"--temperature {sampled_at}; use one for both"
            )

    def _check_score_from(self) -> None:
        if self.scoring.score_from != "rollout":
            return
        if self.rollout.rollout_engine != "megatron":
            raise ConfigError(
                "--score-from rollout takes the hidden states of the student's own generation, and --rollout-engine "
                f"{self.rollout.rollout_engine} has none; use --score-from forward or --rollout-engine megatron"
            )
        student_fp8 = self.precision.fp8_settings()
        if student_fp8 is not None:
            raise ConfigError(
                "--score-from rollout would score the hidden states of another model than the one that is trained: a "
                f"student in training generates without FP8, and {student_fp8.flag} trains it with; use --score-from "
                "forward"
            )
        if self.selection.selection_scope == "carried":
            raise ConfigError(
                "--score-from rollout has no effect with --selection-scope carried, which scores inside the training "
                "forward; drop one of them"
            )

    def _check_fp8(self) -> None:
        settings = self.precision.fp8_settings()
        if settings is not None and settings.param_gather:
            if not self.optimization.use_distributed_optimizer:
                raise ConfigError(
                    "--fp8-param-gather keeps no weights but FP8 ones, whose exact values only the distributed "
                    "optimizer holds; add --use-distributed-optimizer or drop it"
                )
            if settings.recipe == "mxfp8":
                raise ConfigError(
                    "--fp8-param-gather cannot be combined with --fp8-recipe mxfp8 in training in this version"
                )
        if self.score_head.stages and self.loss.importance_ratio != "none":
            raise ConfigError(
                f"--importance-ratio {self.loss.importance_ratio} weighs losses by the student's log-probabilities of "
                "scoring, which --score-head-precision fp8 makes inexact; drop one of them"
            )
        teacher = self.teacher_fp8.fp8_settings()
        if teacher is not None and teacher.param_gather and self.scoring.offload_teacher:
            raise ConfigError(
                "--offload-teacher cannot move weights that --teacher-fp8-param-gather stores in FP8; drop one"
            )


@dataclass(kw_only=True)
class ScoreConfig:
    """Statistics, scores and keep mask of recorded rollouts, as one rollout batch."""

    models: ModelPairConfig
    rollout_data: str
    """Recorded rollouts (JSONL); all of them form the batch over which scores and budget are taken."""
    output: str
    """Score table to write: .parquet or .jsonl, a row a response position."""
    compare: str | None = None
    """Number formats, with commas between: bf16, fp8. The rows are read by LM heads in each of them as well (fp8 in one
    stage and in two), and it is told how their statistics and selections differ from those of the models' own heads."""
    compare_output: str | None = None
    """The figures of --compare as JSON (default: --output with .compare.json in the place of its ending)."""
    max_response_length: int | None = None
    """Refuse a longer response (tokens)."""
    temperature: float = 1.0
    """Divides the logits of both models; the one the responses were sampled with."""
    micro_batch_size: int = 1
    """Responses a forward pass."""
    packing: PackingConfig = field(default_factory=PackingConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    teacher_parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    teacher_fp8: TeacherFp8Config = field(default_factory=TeacherFp8Config)
    score_head: ScoreHeadConfig = field(default_factory=ScoreHeadConfig)
    logits_chunk_bytes: int = 64 * 2**20
    """Memory for one chunk of fp32 logits a model and rank."""
    compile_statistics: bool = False
    """Run the elementwise passes of scoring as one torch.compile loop: needs a C++ compiler (CPU) or Triton (GPUs)."""
    statistics_kernel: Literal["torch", "triton"] = "torch"
    """What goes over the logits of scoring: torch, pass by pass, or a Triton kernel in a single pass (CUDA only,
    --support-k to 128; 2.7 times as fast as torch on an H200, see docs/gpu.md)."""
    seed: int = 1234
    """Seed of the random selector."""

    def __post_init__(self) -> None:
        if not self.output.endswith((".parquet", ".jsonl")):
            raise ConfigError(f"--output {self.output} must end in .parquet or .jsonl")
        if self.micro_batch_size < 1:
            raise ConfigError(f"--micro-batch-size {self.micro_batch_size} must be at least 1")
        self._check_compare()
        self.packing.check_micro_batch_size(self.micro_batch_size)
        refuse_two_kernels(self.compile_statistics, self.statistics_kernel)
        if not self.temperature > 0:
            raise ConfigError(f"--temperature {self.temperature} must be positive: it divides the logits")
        if self.selection.selection_scope != "global":
            raise ConfigError(
                f"--selection-scope {self.selection.selection_scope} has no steps to carry from in taopd score, which "
                "scores one batch; use global"
            )

    def _check_compare(self) -> None:
        if self.compare is None:
            if self.compare_output is not None:
                raise ConfigError(
                    f"--compare-output {self.compare_output} has no effect without --compare; add --compare bf16,fp8"
                )
            return
        for name in self.compared:
            if name not in COMPARABLE or self.compared.count(name) > 1:
                raise ConfigError(
                    f"--compare {self.compare}: {name!r} is not one of {', '.join(COMPARABLE)}, or is given twice"
                )
        if self.score_head != ScoreHeadConfig():
            raise ConfigError(
                "--score-head-precision and --score-head-stages have no effect with --compare, which reads by all "
                "heads; drop them"
            )

    @property
    def compared(self) -> tuple[str, ...]:
        """The formats of --compare; none without it."""
        return () if self.compare is None else tuple(name.strip() for name in self.compare.split(","))

    @property
    def compared_output(self) -> str:
        """Where the figures of --compare go."""
        return self.compare_output or self.output.rsplit(".", 1)[0] + ".compare.json"


@dataclass(kw_only=True)
class RolloutCommandConfig:
    """Responses of a student to a prompt file, written as rollouts JSONL."""

    student: str
    """HF directory, or a Megatron checkpoint directory written by this project."""
    output: str
    """Rollouts file to write (.jsonl)."""
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    seed: int = 1234
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        if self.rollout.rollout_engine != "megatron":
            raise ConfigError(
                f"taopd rollout generates with --rollout-engine megatron, not {self.rollout.rollout_engine!r}"
            )
        if self.data.prompt_data is None:
            raise ConfigError("--prompt-data is missing: a JSONL file with `prompt` or `messages`")
