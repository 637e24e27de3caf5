"""Flags of ``taopd diagnose``."""

from __future__ import annotations

import pytest

from megatron_taopd import cli
from megatron_taopd.commands.diagnose import ACTIONS
from megatron_taopd.config_file import flag_fields
from megatron_taopd.diagnostics.config import BankConfig, GainConfig, ReportConfig
from megatron_taopd.errors import ConfigError
from megatron_taopd.run_config import ModelPairConfig
from tests.test_cli import config_classes, unexplained_fields


@pytest.mark.parametrize("action", ACTIONS)
def test_every_flag_is_explained(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    config_type = ACTIONS[action][0]
    with pytest.raises(SystemExit) as stop:
        cli.main(["diagnose", action, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in flag_fields(config_type):
        assert f"--{name.replace('_', '-')}" in text
    for kind in config_classes(config_type):
        assert unexplained_fields(kind) == [], kind.__name__
    assert cli.main(["diagnose"]) == 0
    assert f"  {action}" in capsys.readouterr().out


def test_defaults_are_the_papers_sizes() -> None:
    words = ["--student=s", "--teacher=t", "--rollout-data=r", "--output=o"]
    config: BankConfig = cli.parse(BankConfig, words, name="x")
    assert (config.resolved_num_prompts, config.positions_per_response) == (300, 192)
    assert (config.responses_per_prompt, config.resolved_support_k) == (1, [8, 16, 32])


def test_values_that_cannot_be() -> None:
    bank = {"models": ModelPairConfig(student="s", teacher=["t"]), "rollout_data": "r", "output": "o"}
    gain = {"bank": "b", "checkpoint": "c", "output": "g.parquet"}
    report = {"bank": "b", "output": "o"}
    for config_type, values, text in (
        (BankConfig, bank | {"support_k": [8, 8]}, "has a value twice"),
        (BankConfig, bank | {"positions_per_response": 0}, "--positions-per-response 0 must be at least 1"),
        (BankConfig, bank | {"temperature": 0.0}, "--temperature 0.0 must be positive"),
        (GainConfig, gain | {"output": "g.jsonl"}, "must end in .parquet"),
        (GainConfig, gain | {"logits_chunk_bytes": 9}, "--logits-chunk-bytes 9 must be at least 65536"),
        (ReportConfig, report | {"keep_ratio": [1.5]}, "--keep-ratio 1.5 must be in "),
        (ReportConfig, report | {"selector": ["teachabilty"]}, "unknown selector .* did you mean 'teachability'"),
    ):
        with pytest.raises(ConfigError, match=text):
            config_type(**values)
