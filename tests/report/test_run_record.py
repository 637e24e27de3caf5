"""A run leaves its versions and its warnings beside its metrics."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from megatron_taopd import __version__
from megatron_taopd.commands.common import announce
from megatron_taopd.run_config import LoggingConfig


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_starts_and_warnings_are_appended(tmp_path: Path) -> None:
    package = logging.getLogger("megatron_taopd")
    before = list(package.handlers)
    try:
        for _ in range(2):
            announce(LoggingConfig(), "x", save_to=str(tmp_path))
        logging.getLogger("megatron_taopd.training.carried").warning("cut %.1f for the <third> time", 0.5)
        logging.getLogger("megatron_taopd.training.carried").info("nothing to see")
    finally:
        package.handlers = before
    starts = lines(tmp_path / "starts.jsonl")
    assert len(starts) == 2
    assert starts[0]["world_size"] == 1
    assert starts[0]["versions"]["megatron_taopd"] == __version__
    assert starts[0]["versions"]["torch"] == torch.__version__
    warned = lines(tmp_path / "warnings.jsonl")
    assert [w["message"] for w in warned] == ["cut 0.5 for the <third> time"] * len(warned)
    assert warned[0]["where"] == "training.carried" and warned[0]["level"] == "warning"
    assert len(warned) == 1  # a second start in one process does not write them twice
