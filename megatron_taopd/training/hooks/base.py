"""What a hook can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_taopd.training.loop import Trainer


class Hook:
    """Called around the steps of a run, on every rank, in the order of the list."""

    only_tells = False
    """Nothing of the run is lost with what it writes: a full disk is warned of once, and does not end the run."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step."""

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After a step; ``metrics`` holds what metrics.jsonl documents, the same on every rank."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step."""

    def on_stop(self, trainer: Trainer) -> None:
        """Instead of ``on_end`` where a run ends before its last step, to go on later."""
