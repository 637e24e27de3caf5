"""Flags of the rollout: what cannot be honoured, or would have no effect, is refused."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_taopd.errors import ConfigError
from megatron_taopd.rollout.config import RolloutConfig

FILE = {"rollout_engine": "file", "rollout_data": "r.jsonl"}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"rollout_engine": "openai", "rollout_batch_size": 4}, ("--rollout-batch-size 4", "--rollout-max-in-flight")),
        ({"rollout_engine": "file"}, ("--rollout-data",)),
        ({"rollout_data": "r.jsonl"}, ("r.jsonl", "no effect", "--rollout-engine file")),
        ({**FILE, "top_p": 0.9}, ("--top-p 0.9", "no effect")),
        ({**FILE, "rollout_batch_size": 4}, ("--rollout-batch-size 4", "no effect")),
        ({**FILE, "num_samples_per_prompt": 2}, ("--num-samples-per-prompt 2", "no effect")),
        ({"temperature": 0.0, "top_p": 0.9}, ("--top-p 0.9", "--temperature 0")),
        ({"temperature": -0.1}, ("--temperature -0.1",)),
        ({"temperature": float("nan")}, ("--temperature nan",)),
        ({"top_p": 0.0}, ("--top-p 0.0",)),
        ({"top_p": 1.1}, ("--top-p 1.1",)),
        ({"max_response_length": 0}, ("--max-response-length 0",)),
        ({"num_samples_per_prompt": 0}, ("--num-samples-per-prompt 0",)),
        ({"rollout_batch_size": 0}, ("--rollout-batch-size 0",)),
    ],
)
def test_refused(settings: dict[str, Any], wanted: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refusal:
        RolloutConfig(**settings)
    for word in wanted:
        assert word in str(refusal.value)


def test_accepted() -> None:
    RolloutConfig()
    RolloutConfig(temperature=0.0)
    RolloutConfig(top_p=1.0, rollout_batch_size=1, num_samples_per_prompt=4)
    RolloutConfig(rollout_engine="file", rollout_data="r.jsonl", temperature=0.7)
