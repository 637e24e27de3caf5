"""``taopd convert`` on the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_taopd.cli import main
from megatron_taopd.commands.convert import ACTIONS
from megatron_taopd.commands.convert_config import MegatronToHFConfig, OutputConfig, parse_size
from megatron_taopd.config_file import flag_fields
from megatron_taopd.errors import ConfigError
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.conftest import ROOT
from tests.convert.models import assert_same_bytes
from tests.test_cli import config_classes, unexplained_fields


@pytest.mark.parametrize("action", ACTIONS)
def test_every_flag_is_explained(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    config_type = ACTIONS[action][0]
    with pytest.raises(SystemExit) as stop:
        main(["convert", action, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in flag_fields(config_type):
        assert f"--{name.replace('_', '-')}" in text
    for kind in config_classes(config_type):
        assert unexplained_fields(kind) == [], kind.__name__


def test_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    source = save_tiny_hf_model(tmp_path / "hf", "mistral", num_layers=1)
    (tmp_path / "c.yaml").write_text(f"source: {source}\nmax-shard-size: 100KB\n")
    there = ["convert", "hf-to-megatron", "--config", f"{tmp_path}/c.yaml", "--output", f"{tmp_path}/megatron"]
    back = ["convert", "megatron-to-hf", "--source", f"{tmp_path}/megatron", "--output", f"{tmp_path}/back"]
    assert main(there) == 0 and main(back) == 0
    assert "converted: " in capsys.readouterr().out
    assert_same_bytes(source, tmp_path / "back")
    assert main(back) == 2
    assert "back exists; give another --output, or --overwrite" in capsys.readouterr().err
    assert main([*back, "--overwrite", "--dtype", "bfloat16"]) == 0


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["convert"]) == 0
    usage = capsys.readouterr().out
    assert all(action in usage for action in ACTIONS)
    assert main(["convert", "hf-to-megatrn"]) == 2
    assert "unknown conversion 'hf-to-megatrn'; did you mean hf-to-megatron?" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["convert", "verify", "--hf", "a", "--model", "b"]) == 2
    assert "works in one process and 2 were started" in capsys.readouterr().err


def test_sizes() -> None:
    assert parse_size("--x", "1000") == 1000
    assert parse_size("--x", "2.5GB") == 2_500_000_000
    assert parse_size("--x", "2 MiB") == 2 * 2**20
    for text in ("", "many", "5TBs", "0GB", "-1GB"):
        with pytest.raises(ConfigError, match="--max-shard-size .* is no size; write it like 5GB"):
            MegatronToHFConfig(source="a", writing=OutputConfig(output="b"), max_shard_size=text)


def test_the_scripts_are_the_commands() -> None:
    for script, action in (
        ("convert_hf_to_megatron", "hf-to-megatron"),
        ("convert_megatron_to_hf", "megatron-to-hf"),
        ("verify_conversion", "verify"),
    ):
        words = [sys.executable, str(ROOT / "tools" / f"{script}.py"), "--help"]
        run = subprocess.run(words, capture_output=True, text=True)
        assert run.returncode == 0 and f"taopd convert {action}" in run.stdout, run.stderr
