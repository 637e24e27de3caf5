"""Megatron's console line, with the time that is left."""

from __future__ import annotations

import datetime
import time
from typing import TYPE_CHECKING

from megatron_taopd.platform import distributed
from megatron_taopd.training.hooks.base import Hook

if TYPE_CHECKING:
    from megatron_taopd.training.loop import Trainer


class ConsoleHook(Hook):
    """Prints ``iteration … | name: value | …`` on rank 0, every ``interval`` iterations, averaged over them."""

    only_tells = True

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.recent: list[dict[str, float]] = []
        self.skipped = 0
        self.started = time.perf_counter()
        self.first_iteration = 0

    def on_start(self, trainer: Trainer) -> None:
        self.started = time.perf_counter()
        self.first_iteration = trainer.state.iteration

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self.recent.append(metrics)
        self.skipped += int(metrics["skipped"])
        iteration, last = trainer.state.iteration, trainer.config.batch.train_iters
        if iteration % self.interval and iteration != last:
            return
        done = iteration - self.first_iteration
        left = (time.perf_counter() - self.started) / done * (last - iteration)
        if distributed.rank() == 0:
            print(self.line(trainer, left), flush=True)
        self.recent.clear()

    def line(self, trainer: Trainer, seconds_left: float) -> str:
        """The line of the iterations since the last one."""

        def mean(name: str) -> float:
            return sum(m[name] for m in self.recent) / len(self.recent)

        state, last = trainer.state, trainer.config.batch.train_iters
        now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        fields = [
            f"iteration {state.iteration:8d}/{last:8d}",
            f"consumed samples: {state.consumed_samples:12d}",
            f"elapsed time per iteration (ms): {mean('time_step') * 1000:.1f}",
            f"learning rate: {self.recent[-1]['learning_rate']:.6E}",
            f"global batch size: {trainer.config.batch.global_batch_size:5d}",
            f"distillation loss: {mean('loss'):.6E}",
            f"grad norm: {mean('grad_norm'):.3f}",
            f"forward KL: {mean('kl_forward'):.4f}",
            f"kept tokens: {mean('num_kept_tokens'):.0f} of {mean('num_valid_tokens'):.0f}",
            f"mean C: {mean('mean_C'):.3f}",
            f"response length: {mean('response_length'):.1f}",
            f"rollout/score/train (s): {mean('time_rollout'):.1f}/{mean('time_score'):.1f}/{mean('time_train'):.1f}",
            f"tokens/s: {mean('tokens_per_second'):.0f}",
            f"number of skipped iterations: {self.skipped:3d}",
            f"time left: {datetime.timedelta(seconds=round(seconds_left))}",
        ]
        return f" [{now}] " + " | ".join(fields) + " |"
