"""``metrics.jsonl``: one object an iteration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_taopd.platform import distributed
from megatron_taopd.training.hooks.base import Hook

if TYPE_CHECKING:
    from megatron_taopd.training.loop import Trainer


class MetricsFileHook(Hook):
    """Appends each step's metrics on rank 0. A resumed run drops lines past the iteration that it resumes from."""

    def __init__(self, log_dir: str) -> None:
        self.path = Path(log_dir) / "metrics.jsonl"

    def on_start(self, trainer: Trainer) -> None:
        if distributed.rank() != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _iteration(line) <= trainer.state.iteration]
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if distributed.rank() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(metrics) + "\n")


def _iteration(line: str) -> float:
    """Iteration of a line; a line torn by a killed run sorts after every iteration."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
