"""Flags of the rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_taopd.errors import ConfigError


@dataclass(kw_only=True)
class RolloutConfig:
    """Where responses come from and how they are sampled."""

    rollout_engine: Literal["megatron", "file", "openai"] = "megatron"
    """megatron: the live student answers --prompt-data through megatron-core's inference. file: recorded
    responses of --rollout-data. openai: a vLLM or SGLang server at --rollout-url answers --prompt-data."""
    rollout_data: str | None = None
    """Recorded rollouts (JSONL) for --rollout-engine file; token ids are enough."""
    num_samples_per_prompt: int = 1
    """Responses to each prompt of a step."""
    max_response_length: int = 256
    """Tokens after which a response is cut; a longer recorded one is refused."""
    temperature: float = 1.0
    """Divides the student's logits before sampling; 0 takes the likeliest token."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability (default: from all)."""
    rollout_batch_size: int | None = None
    """Responses that a replica generates together: bounds the memory of keys and values (default: 64)."""

    def __post_init__(self) -> None:
        if self.num_samples_per_prompt < 1:
            raise ConfigError(f"--num-samples-per-prompt {self.num_samples_per_prompt} must be at least 1")
        if self.max_response_length < 1:
            raise ConfigError(f"--max-response-length {self.max_response_length} must be at least 1")
        if not self.temperature >= 0:
            raise ConfigError(f"--temperature {self.temperature} must not be negative (0 is greedy)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p} must be above 0 and at most 1")
        if self.rollout_batch_size is not None and self.rollout_batch_size < 1:
            raise ConfigError(f"--rollout-batch-size {self.rollout_batch_size} must be at least 1")
        if self.top_p is not None and self.temperature == 0:
            raise ConfigError(
                f"--top-p {self.top_p} has no effect with --temperature 0, which is greedy; drop one of them"
            )
        if self.rollout_engine == "openai" and self.rollout_batch_size is not None:
            raise ConfigError(
                f"--rollout-batch-size {self.rollout_batch_size} has no effect with --rollout-engine openai, where the "
                "server makes its batches; --rollout-max-in-flight bounds what it is asked for at once"
            )
        if self.rollout_engine == "file":
            self._check_file_engine()
        elif self.rollout_data is not None:
            raise ConfigError(
                f"--rollout-data {self.rollout_data} has no effect with --rollout-engine "
                f"{self.rollout_engine}; use --rollout-engine file to train on it"
            )

    def _check_file_engine(self) -> None:
        if self.rollout_data is None:
            raise ConfigError("--rollout-engine file reads recorded responses; name them with --rollout-data")
        unused = {
            "--top-p": self.top_p,
            "--rollout-batch-size": self.rollout_batch_size,
            "--num-samples-per-prompt": None if self.num_samples_per_prompt == 1 else self.num_samples_per_prompt,
        }
        for flag, value in unused.items():
            if value is not None:
                raise ConfigError(
                    f"{flag} {value} has no effect with --rollout-engine file, which samples nothing; drop it"
                )
