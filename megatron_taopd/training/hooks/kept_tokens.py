"""``kept_tokens/iter_NNNNNNN.jsonl``: which tokens of some responses are kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_taopd.config import TrainConfig
from megatron_taopd.monitor_config import DEFAULT_RESPONSES
from megatron_taopd.platform import distributed
from megatron_taopd.training.hooks.base import Hook
from megatron_taopd.training.kept_tokens import evenly_chosen, gather_kept_tokens, write_kept_tokens

if TYPE_CHECKING:
    from megatron_taopd.training.loop import Trainer


class KeptTokensHook(Hook):
    """Writes a file every ``interval`` iterations on rank 0. A resumed run removes those past where it resumes."""

    only_tells = True

    def __init__(self, log_dir: str, *, interval: int, responses: int) -> None:
        self.directory = Path(log_dir) / "kept_tokens"
        self.interval = interval
        self.responses = responses

    @classmethod
    def asked_for(cls, config: TrainConfig) -> list[KeptTokensHook]:
        """One, or none."""
        monitor, log_dir = config.monitor, config.logging.log_dir
        if monitor.dump_kept_interval is None or log_dir is None:
            return []
        responses = DEFAULT_RESPONSES if monitor.dump_kept_responses is None else monitor.dump_kept_responses
        return [cls(log_dir, interval=monitor.dump_kept_interval, responses=responses)]

    def path(self, iteration: int) -> Path:
        """The file of an iteration."""
        return self.directory / f"iter_{iteration:07d}.jsonl"

    def on_start(self, trainer: Trainer) -> None:
        if distributed.rank() == 0:
            for file in self.directory.glob("iter_*.jsonl"):
                if file.name > self.path(trainer.state.iteration).name:
                    file.unlink()

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        iteration = trainer.state.iteration
        if iteration % self.interval:
            return
        assert trainer.last_step is not None, "hooks are called after a step"
        rollouts, outcome = trainer.last_step
        chosen = evenly_chosen(trainer.config.batch.global_batch_size, self.responses)
        lines = gather_kept_tokens(outcome, rollouts, chosen)
        if lines is not None:
            write_kept_tokens(self.path(iteration), lines, trainer.pair.tokenizer, iteration=iteration)
