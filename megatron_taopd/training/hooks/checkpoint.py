"""Periodic Megatron checkpoints, and the HF export at the end."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from megatron_taopd.checkpoint import save_checkpoint
from megatron_taopd.convert.export import export_hf
from megatron_taopd.platform import distributed
from megatron_taopd.training.hooks.base import Hook

if TYPE_CHECKING:
    from megatron_taopd.training.loop import Trainer

logger = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """Saves every ``interval`` iterations (None: at the end only) and after the last one."""

    def __init__(self, directory: str, interval: int | None, resolved_config: dict[str, Any]) -> None:
        self.directory = directory
        self.interval = interval
        self.resolved_config = resolved_config
        self.saved_iteration = -1

    def on_start(self, trainer: Trainer) -> None:
        self.saved_iteration = trainer.state.iteration

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if self.interval is not None and trainer.state.iteration % self.interval == 0:
            self.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self.saved_iteration != trainer.state.iteration:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the checkpoint of this iteration; all ranks call it."""
        path = save_checkpoint(
            self.directory,
            iteration=trainer.state.iteration,
            module=trainer.student,
            optimizer=trainer.optimizer,
            scheduler=trainer.scheduler,
            extra_state=trainer.state_dict(),
            config=self.resolved_config,
            hf_source=trainer.pair.student.hf.path,
        )
        self.saved_iteration = trainer.state.iteration
        if distributed.rank() == 0:
            logger.info("saved checkpoint %s", path)


class ExportHook(Hook):
    """Writes the student as an HF directory after the last step."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def on_end(self, trainer: Trainer) -> None:
        export_hf(trainer.pair.student.modules, trainer.pair.student.hf, self.directory)
        if distributed.rank() == 0:
            logger.info("wrote the student as an HF directory: %s", self.directory)
