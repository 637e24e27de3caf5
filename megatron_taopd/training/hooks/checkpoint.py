"""Periodic Megatron checkpoints, and the HF export at the end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_taopd.checkpoint import PendingSave, begin_saving
from megatron_taopd.checkpoint_config import CheckpointConfig
from megatron_taopd.convert.export import export_hf
from megatron_taopd.platform import distributed, progress
from megatron_taopd.training.hooks.base import Hook

if TYPE_CHECKING:
    from megatron_taopd.training.loop import Trainer

logger = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """Saves every ``--save-interval`` iterations (default: at the end only) and after the last one.

    With ``--async-save`` a checkpoint is published between two later steps, when all ranks have written.
    """

    def __init__(self, config: CheckpointConfig, resolved_config: dict[str, Any]) -> None:
        assert config.save is not None, "there is nothing to do without --save"
        self.directory = Path(config.save)
        self.config = config
        self.resolved_config = resolved_config
        self.saved_iteration = -1
        self.pending: PendingSave | None = None

    def on_start(self, trainer: Trainer) -> None:
        self.saved_iteration = trainer.state.iteration

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if self.pending is not None and self.pending.done():
            self._publish()
        interval = self.config.save_interval
        if interval is not None and trainer.state.iteration % interval == 0:
            self._begin(trainer, in_background=self.config.async_save)

    def on_end(self, trainer: Trainer) -> None:
        if self.saved_iteration != trainer.state.iteration:
            self._begin(trainer, in_background=False)
        self._publish()

    def on_stop(self, trainer: Trainer) -> None:
        self.on_end(trainer)

    def _begin(self, trainer: Trainer, *, in_background: bool) -> None:
        """Write the checkpoint of this iteration; all ranks call it."""
        self._publish()  # one at a time
        progress.beat()
        self.pending = begin_saving(
            self.directory,
            iteration=trainer.state.iteration,
            module=trainer.student,
            optimizer=trainer.optimizer,
            scheduler=trainer.scheduler,
            extra_state=trainer.state_dict(),
            config=self.resolved_config,
            hf_source=trainer.pair.student.hf.path,
            keep_last=self.config.keep_last_checkpoints,
            in_background=in_background,
        )
        self.saved_iteration = trainer.state.iteration
        if not in_background:
            self._publish()

    def _publish(self) -> None:
        """Finish the checkpoint that is being written, if there is one."""
        if self.pending is None:
            return
        progress.beat()
        path, self.pending = self.pending.finish(), None
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
