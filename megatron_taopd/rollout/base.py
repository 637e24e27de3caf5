"""What every engine that generates does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_taopd.data.prompts import Prompt
from megatron_taopd.data.records import Rollout


class RolloutEngine(Protocol):
    """Answers prompts with the student as it is now."""

    def generate(self, prompts: Sequence[Prompt], *, step: int, sample_offset: int) -> list[Rollout]:
        """One response a prompt, in order.

        The same on all ranks of a data-parallel replica, which call it together. It depends on the weights,
        the engine's seed, ``step``, the prompts and their indices in the global batch, and on nothing else:
        not on the layout, nor on how the batch is split.

        Args:
            prompts: this replica's share of the global batch, repeated for several responses to one.
            step: training step, part of the seed.
            sample_offset: index of the first prompt in the global batch.
        """

    def figures(self) -> dict[str, float]:
        """Of the last :meth:`generate`, for the metrics (docs/metrics.md); the same on every rank."""
