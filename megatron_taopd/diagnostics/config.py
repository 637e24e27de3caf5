"""Flags of ``taopd diagnose``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from megatron_taopd.errors import ConfigError
from megatron_taopd.platform.layout import ParallelConfig, TeacherParallelConfig
from megatron_taopd.registry import resolve
from megatron_taopd.run_config import ModelPairConfig, PackingConfig, PrecisionConfig
from megatron_taopd.teachability import SELECTORS

DEFAULT_NUM_PROMPTS = 300
DEFAULT_SUPPORT_K = [8, 16, 32]
DEFAULT_KEEP_RATIOS = [0.01, 0.03, 0.05, 0.1]


@dataclass(kw_only=True)
class BankConfig:
    """Freeze a bank of contexts that the student visited, with what student and teacher say at every position."""

    models: ModelPairConfig
    rollout_data: str
    """Responses of the student (JSONL), as `taopd rollout` writes them."""
    output: str
    """Directory of the bank. It is written once: an existing one is refused."""
    num_prompts: int | None = None
    """Prompts whose responses are taken, the first of the file (default: 300, or all if there are fewer)."""
    responses_per_prompt: int = 1
    """Responses to each prompt, its first ones. Intervals come from resampling prompts."""
    positions_per_response: int = 192
    """Positions of a response that are taken, the first ones; the rest of a longer response is cut off."""
    support_k: Annotated[list[int], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Size K of the top-K supports; the flag again for each of several (default: 8, 16 and 32)."""
    temperature: float = 1.0
    """Divides the logits of both models; the one the responses were sampled with."""
    micro_batch_size: int = 1
    """Responses a forward pass."""
    packing: PackingConfig = field(default_factory=PackingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    teacher_parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    logits_chunk_bytes: int = 64 * 2**20
    """Memory for one chunk of fp32 logits a model and rank."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "responses_per_prompt", "positions_per_response", "micro_batch_size"):
            _at_least_one(name, getattr(self, name))
        _check_chunk_bytes(self.logits_chunk_bytes)
        for k in self.support_k:
            _at_least_one("support_k", k)
        if len(set(self.support_k)) < len(self.support_k):
            raise ConfigError(f"--support-k {self.support_k} has a value twice; give each once")
        self.packing.check_micro_batch_size(self.micro_batch_size)
        if not self.temperature > 0:
            raise ConfigError(f"--temperature {self.temperature} must be positive: it divides the logits")

    @property
    def resolved_num_prompts(self) -> int:
        """Most prompts of the bank."""
        return self.num_prompts or DEFAULT_NUM_PROMPTS

    @property
    def resolved_support_k(self) -> list[int]:
        """The K in use, ascending."""
        return sorted(self.support_k or DEFAULT_SUPPORT_K)


@dataclass(kw_only=True)
class GainConfig:
    """Score a bank's positions again with a checkpoint: how far did the gap to the teacher close at each?"""

    bank: str
    """Directory of the bank. Teacher, temperature and number formats are the bank's."""
    checkpoint: str
    """HF directory, or a Megatron checkpoint directory written by this project."""
    output: str
    """Gain file to write (.parquet)."""
    teacher: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Where the bank's teacher is now, if not where it was; NAME=DIRECTORY for one of several."""
    micro_batch_size: int | None = None
    """Responses a forward pass (default: the bank's)."""
    packing: PackingConfig = field(default_factory=PackingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    teacher_parallel: TeacherParallelConfig = field(default_factory=TeacherParallelConfig)
    logits_chunk_bytes: int | None = None
    """Memory for one chunk of fp32 logits a model and rank (default: the bank's)."""

    def __post_init__(self) -> None:
        _at_least_one("micro_batch_size", self.micro_batch_size)
        _check_chunk_bytes(self.logits_chunk_bytes)
        if self.micro_batch_size is not None:
            self.packing.check_micro_batch_size(self.micro_batch_size)
        if not self.output.endswith(".parquet"):
            raise ConfigError(f"--output {self.output} must end in .parquet")


@dataclass(kw_only=True)
class ReportConfig:
    """What tells the gain of one or more checkpoints on a bank: tables, regressions, intervals, plots."""

    bank: str
    """Directory of the bank."""
    output: str
    """Directory for report.json, report.md and the plots."""
    gain: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Gain file of a checkpoint, or NAME=FILE; the flag again for each of several, the first of which the others are
    compared with. Without any, the report is about the bank alone."""
    support_k: int = 16
    """K of everything that is shown for one K; the bank must have it."""
    keep_ratio: Annotated[list[float], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Budget at which selectors are compared; the flag again for each of several (default: 0.01, 0.03, 0.05, 0.1)."""
    selector: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Selector to compare, or your own as pkg.module:function; the flag again for each of several (default: all of
    ours but full)."""
    bootstrap_draws: int = 1000
    """Resamplings of the prompts behind each interval."""
    seed: int = 1234
    """Seed of the resampling and of the random selector."""

    def __post_init__(self) -> None:
        for name in ("support_k", "bootstrap_draws"):
            _at_least_one(name, getattr(self, name))
        for ratio in self.keep_ratio:
            if not 0 < ratio <= 1:
                raise ConfigError(f"--keep-ratio {ratio} must be in (0, 1]; 0.1 keeps a tenth")
        for selector in self.selector:
            resolve("selector", selector, SELECTORS)

    @property
    def resolved_keep_ratios(self) -> list[float]:
        """Budgets, ascending."""
        return sorted(set(self.keep_ratio or DEFAULT_KEEP_RATIOS))

    @property
    def resolved_selectors(self) -> list[str]:
        """Selectors in the order in which they are shown."""
        return list(dict.fromkeys(self.selector)) or [name for name in SELECTORS if name != "full"]


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")


def _check_chunk_bytes(value: int | None) -> None:
    if value is not None and value < 2**16:
        raise ConfigError(f"--logits-chunk-bytes {value} must be at least {2**16}")
