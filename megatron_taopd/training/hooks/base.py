"""What a hook can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_taopd.training.loop import Trainer


class Hook:
    """Called around the steps of a run, on every rank, in the order of the list."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step."""

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After a step; ``metrics`` holds what metrics.jsonl documents, the same on every rank."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step."""
