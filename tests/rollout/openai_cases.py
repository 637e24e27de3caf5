"""What the ranks run for test_openai_engine.py."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron_taopd import cli
from megatron_taopd.errors import TaopdError


def words(root: Path, out: Path, **flags: Any) -> list[str]:
    """``taopd train`` for two small steps whose responses depend on the weights; ``flags`` come on top."""
    given: dict[str, Any] = {
        "student": root / "student",
        "teacher": root / "teacher",
        "prompt-data": root / "prompts.jsonl",
        "max-response-length": 6,
        "temperature": 0,
        "distillation-temperature": 1,
        "global-batch-size": 8,
        "micro-batch-size": 2,
        "train-iters": 2,
        "keep-ratio": 0.5,
        "optimizer": "sgd",
        "lr": 2.0,
        "log-dir": out,
        "export-hf": out / "hf",
    } | {name.replace("_", "-"): value for name, value in flags.items()}
    return ["train", *(f"--{name}={value}" for name, value in given.items() if value is not None)]


def served(url: str, api: str, out: Path, *, every: int = 1, **flags: Any) -> dict[str, Any]:
    """Flags of the engine."""
    return {
        "rollout_engine": "openai",
        "rollout_url": url,
        "rollout_api": api,
        "rollout_weights_every": every,
        "rollout_weights_dir": out / "weights" if every else None,
    } | flags


def train(root: Path, out: Path, flags: dict[str, Any]) -> str | None:
    """Runs in every rank; the message of a refusal."""
    try:
        cli.run(words(root, out, **flags))
    except TaopdError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger("megatron_taopd").handlers.clear()
    return None
