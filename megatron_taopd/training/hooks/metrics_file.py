"""``metrics.jsonl``: one object an iteration."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_taopd.platform import distributed
from megatron_taopd.training.hooks.base import Hook

if TYPE_CHECKING:
    from megatron_taopd.training.loop import Trainer

logger = logging.getLogger(__name__)


class MetricsFileHook(Hook):
    """Appends each step's metrics on rank 0. A resumed run drops lines past the iteration that it resumes from.

    A disk that is full ends no run: lines wait in memory until they can be written.
    """

    def __init__(self, log_dir: str) -> None:
        self.path = Path(log_dir) / "metrics.jsonl"
        self.waiting: list[str] = []

    def on_start(self, trainer: Trainer) -> None:
        if distributed.rank() != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            self.path.touch()
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _iteration(line) <= trainer.state.iteration]
        aside = self.path.with_name(f".{self.path.name}.partial")
        aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(aside, self.path)

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if distributed.rank() == 0:
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self.waiting.append(json.dumps(finite) + "\n")
            self._write()

    def on_end(self, trainer: Trainer) -> None:
        if distributed.rank() == 0:
            self._write()

    def on_stop(self, trainer: Trainer) -> None:
        self.on_end(trainer)

    def _write(self) -> None:
        text = "".join(self.waiting).encode()
        if not text:
            return
        try:
            with self.path.open("ab") as file:
                end = file.tell()
                try:
                    file.write(text)
                    file.flush()
                except OSError:
                    file.truncate(end)  # no half lines
                    raise
        except OSError as error:
            if len(self.waiting) == 1:
                logger.warning("cannot write %s: %s; its lines wait for space, and training goes on", self.path, error)
            return
        if len(self.waiting) > 1:
            logger.warning("%s could be written again: %d lines had waited", self.path, len(self.waiting) - 1)
        self.waiting.clear()


def _iteration(line: str) -> float:
    """Iteration of a line; a line torn by a killed run sorts after every iteration."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
