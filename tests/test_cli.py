"""Flags, YAML and help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from pathlib import Path

import pytest
import yaml

from megatron_taopd import cli
from megatron_taopd.config import RolloutCommandConfig, ScoreConfig, TrainConfig
from megatron_taopd.config_file import flag_fields, flat_values
from megatron_taopd.evaluation.config import EvalConfig

# The flags that DESIGN's command-line contract fixes.
CONTRACT = """
student teacher prompt-data rollout-engine rollout-data num-samples-per-prompt max-prompt-length max-response-length
temperature seed tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size
expert-model-parallel-size sequence-parallel use-distributed-optimizer micro-batch-size global-batch-size train-iters
selector keep-ratio support-k support-mode compatibility-scale min-keep-per-sample selection-scope loss loss-support
jsd-beta optimizer lr min-lr lr-decay-style lr-warmup-iters weight-decay clip-grad bf16 fp8-format fp8-recipe save load
save-interval export-hf log-interval log-dir tensorboard-dir
""".split()


def test_contract_flags_exist() -> None:
    flags = {name.replace("_", "-") for name in flag_fields(TrainConfig)}
    assert set(CONTRACT) <= flags


@pytest.mark.parametrize("config_type", [TrainConfig, ScoreConfig, RolloutCommandConfig, EvalConfig])
def test_every_flag_is_explained(config_type: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse(config_type, ["--help"], name="x")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in flag_fields(config_type):
        assert f"--{name.replace('_', '-')}" in text
    for kind in config_classes(config_type):
        assert unexplained_fields(kind) == [], kind.__name__


def config_classes(config_type: type) -> list[type]:
    """A configuration class and those nested in it."""
    nested = [kind for kind in typing.get_type_hints(config_type).values() if dataclasses.is_dataclass(kind)]
    return [config_type, *(c for kind in nested for c in config_classes(typing.cast(type, kind)))]


def unexplained_fields(kind: type) -> list[str]:
    """Fields without a docstring under them, which is what --help shows."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    missing = []
    for statement, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if not explained and not dataclasses.is_dataclass(typing.get_type_hints(kind)[statement.target.id]):
                missing.append(statement.target.id)
    return missing


def test_yaml_is_layered_under_flags(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "student: a\nteacher: b\nkeep-ratio: 0.05\nlr: 1.0e-4\nsequence_parallel: false\nprompt-data: p.jsonl\n"
        "log_dir: null\n"
    )
    config = cli.parse(TrainConfig, ["--config", str(tmp_path / "c.yaml"), "--lr", "2e-4"], name="train")
    assert config.models.student == "a"
    assert config.selection.keep_ratio == 0.05
    assert config.optimization.lr == 2e-4
    assert config.logging.log_dir is None


def test_teachers_of_the_command_line_replace_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("student: a\nteacher: [math=b, code=c]\nprompt-data: p.jsonl\n")
    words = ["--config", str(path)]
    config = cli.parse(TrainConfig, words, name="train")
    assert config.models.named_teachers() == [("math", "b"), ("code", "c")]
    config = cli.parse(TrainConfig, [*words, "--teacher", "d/e=f"], name="train")
    assert config.models.named_teachers() == [(None, "d/e=f")]


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    words = [
        "--student=a",
        "--teacher=b",
        "--prompt-data=p.jsonl",
        "--loss=jsd",
        "--jsd-beta=0.3",
        "--lr=3e-5",
    ]
    config = cli.parse(TrainConfig, words, name="train")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(flat_values(config)))
    assert cli.parse(TrainConfig, ["--config", str(tmp_path / "c.yaml")], name="train") == config


def test_usage_lists_the_sub_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
