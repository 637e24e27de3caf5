"""TensorBoard: Megatron's names for Megatron's things, ours under ``taopd/``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_taopd.platform import distributed
from megatron_taopd.training.hooks.base import Hook

if TYPE_CHECKING:
    from megatron_taopd.training.loop import Trainer

MEGATRON_NAMES = {
    "learning_rate": "learning-rate",
    "grad_norm": "grad-norm",
    "time_step": "iteration-time",
    "loss": "distillation loss",
}


class TensorBoardHook(Hook):
    """Writes scalars on rank 0."""

    only_tells = True

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        if distributed.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.directory, purge_step=trainer.state.iteration + 1)

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if self.writer is None:
            return
        for name, value in metrics.items():
            if name != "iteration":
                tag = MEGATRON_NAMES.get(name, f"taopd/{name}")
                self.writer.add_scalar(tag, value, trainer.state.iteration)

    def on_stop(self, trainer: Trainer) -> None:
        self.on_end(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self.writer is not None:
            self.writer.close()
