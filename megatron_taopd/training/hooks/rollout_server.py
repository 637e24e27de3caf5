"""Gives the servers of ``--rollout-engine openai`` the student's weights."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_taopd.config import TrainConfig
from megatron_taopd.convert.export import export_hf
from megatron_taopd.errors import RolloutError
from megatron_taopd.platform import distributed
from megatron_taopd.rollout.openai.engine import OpenAIEngine
from megatron_taopd.training.hooks.base import Hook
from megatron_taopd.training.sources import GeneratedResponses, ResponseSource

if TYPE_CHECKING:
    from megatron_taopd.training.loop import Trainer

logger = logging.getLogger(__name__)

LARGE_GAP = 0.1
"""Nats a token; rounding in bf16 makes some hundredths."""


class RolloutServerHook(Hook):
    """Ahead of the first step, and every ``--rollout-weights-every`` steps; after a failure ahead of each next one.

    A directory an update, because servers may still read the one before; those before, also of an earlier start of the
    run, are removed when all have loaded.
    """

    def __init__(self, engine: OpenAIEngine, directory: str, every: int) -> None:
        self.engine = engine
        self.directory = Path(directory)
        self.every = every
        self.behind = False
        self.warned = False

    @classmethod
    def asked_for(cls, config: TrainConfig, source: ResponseSource) -> list[RolloutServerHook]:
        """The hook of a run whose servers get weights; none for others."""
        servers = config.rollout_server
        if not servers.rollout_weights_every:
            return []
        assert isinstance(source, GeneratedResponses) and isinstance(source.engine, OpenAIEngine)
        assert servers.rollout_weights_dir is not None, "RolloutServerConfig.check_against requires it"
        return [cls(source.engine, servers.rollout_weights_dir, servers.rollout_weights_every)]

    def on_start(self, trainer: Trainer) -> None:
        if not trainer.finished:
            self._update(trainer)

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        self._compare(trainer, metrics)
        due = trainer.state.iteration % self.every == 0
        if (due or self.behind) and not trainer.finished:
            self._update(trainer)

    def _compare(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Say once where the servers' log-probabilities are not those of the weights that they should have."""
        sampled_at = trainer.config.rollout.temperature or 1.0
        comparable = sampled_at == trainer.temperature and metrics["rollout_staleness_max"] == 0
        if comparable and metrics["rollout_logprob_gap"] > LARGE_GAP and not self.warned:
            self.warned = True
            logger.warning(
                "iteration %d: the servers' log-probabilities differ from the student's by %.2f nats a token, although "
                "they have its weights: another temperature (vLLM wants --logprobs-mode processed_logprobs), another "
                "or a quantised model, or weights that were not loaded",
                metrics["iteration"],
                metrics["rollout_logprob_gap"],
            )

    def _update(self, trainer: Trainer) -> None:
        iteration, student = trainer.state.iteration, trainer.pair.student
        path = self.directory / f"served_{iteration:07d}"
        started = time.perf_counter()
        export_hf(student.modules, student.hf, path)
        exported = time.perf_counter()
        try:
            self.engine.load_weights(path, iteration)
        except RolloutError as error:
            if self.engine.too_old(iteration) is not None:
                raise
            self.behind = True
            logger.warning(
                "iteration %d: the servers answer with weights of iteration %s until the next update: %s",
                iteration,
                self.engine.weights_iteration,
                error,
            )
            return
        self.behind = False
        logger.info(
            "the servers have the weights of iteration %d (%.1f s to write them, %.1f s to load them)",
            iteration,
            exported - started,
            time.perf_counter() - exported,
        )
        if distributed.is_rank_zero():
            for earlier in self.directory.glob("served_" + 7 * "[0-9]"):
                if earlier != path:
                    shutil.rmtree(earlier, ignore_errors=True)
