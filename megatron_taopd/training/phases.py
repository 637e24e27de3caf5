"""The scope of a run: the configured selector's alone, or with a warm-up and a fall-back around it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_taopd.config import TrainConfig
from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.monitor_config import MonitorConfig
from megatron_taopd.platform import device
from megatron_taopd.teachability.phases import Fallback, PhaseConfig
from megatron_taopd.teachability.selectors import READS_NO_STATISTICS
from megatron_taopd.training.carried import CarriedScope
from megatron_taopd.training.pair import ModelPair
from megatron_taopd.training.scopes import GlobalScope, Outcome, SelectionScope
from megatron_taopd.training.step import TrainMicroBatch

logger = logging.getLogger(__name__)


def open_scope(
    config: TrainConfig,
    pair: ModelPair,
    student: Sequence[torch.nn.Module],
    *,
    temperature: float,
    saved: dict[str, Any],
) -> SelectionScope:
    """As the flags say; ``saved`` is what :meth:`SelectionScope.state` gave to a checkpoint, or empty."""

    def scope_of(selector: str, saved: dict[str, Any]) -> SelectionScope:
        selection = config.selection.with_selector(selector)
        alone = replace(config, selection=selection, phases=PhaseConfig(), monitor=MonitorConfig())
        exact = GlobalScope(alone, pair, student, temperature=temperature)
        if selection.selection_scope == "carried" or _is_chosen_by_place(alone):
            return CarriedScope(exact, saved)
        return exact

    phases = config.phases
    configured = scope_of(config.selection.selector, saved)
    if not phases.full_selector_warmup_iters and phases.fallback_selector is None:
        return configured
    scope = PhasedScope(config, configured, warmup=scope_of("full", {}) if phases.full_selector_warmup_iters else None)
    if phases.fallback_selector is not None:
        scope.add_fallback(scope_of(phases.fallback_selector, saved.get("fallback_scope", {})), saved.get("fallback"))
    return scope


def _is_chosen_by_place(config: TrainConfig) -> bool:
    """Whether the kept rows are known without statistics, which the training forward can then give: the student needs
    no pass of its own for them, and neither kept rows nor loss are others."""
    return config.selection.selector in READS_NO_STATISTICS and config.scoring.score_from == "forward"


class PhasedScope:
    """Hands each step to one of up to three scopes; the others learn from it what they carry.

    Which one depends on the number of the step and on the shares of the steps before, so that a resumed run goes on as
    the undisturbed one does.
    """

    def __init__(self, config: TrainConfig, configured: SelectionScope, warmup: SelectionScope | None) -> None:
        self.config = config
        self.configured = configured
        self.warmup = warmup
        self.fallback_scope: SelectionScope | None = None
        self.fallback: Fallback | None = None
        self.why = "so it was when this run was saved"
        self.told = False

    def add_fallback(self, scope: SelectionScope, saved: dict[str, Any] | None) -> None:
        """With a scope that may take over from now on."""
        self.fallback_scope = scope
        self.fallback = Fallback.from_config(self.config.phases)
        if saved is not None:
            self.fallback.restore(saved)

    def before(self, micro_batches: Sequence[MicroBatch], *, step: int) -> list[TrainMicroBatch]:
        in_force = self._in_force(step)
        self._tell(in_force, step)
        return in_force.before(micro_batches, step=step)

    def after(self, *, step: int) -> Outcome:
        in_force = self._in_force(step)
        outcome = in_force.after(step=step)
        for scope in self._all():
            if scope is not in_force:
                scope.observe(outcome, step=step)
        if self.warmup is not None:
            outcome.phase["full_selector_warmup"] = float(in_force is self.warmup)
            if step + 1 == self.config.phases.full_selector_warmup_iters:
                logger.info("iteration %d: the last one of the warm-up that keeps every position", step + 1)
        if self.fallback is not None:
            outcome.phase["fallback"] = float(in_force is self.fallback_scope)
            self._see(self.fallback, outcome, step)
        return outcome

    def observe(self, outcome: Outcome, *, step: int) -> None:
        for scope in self._all():
            scope.observe(outcome, step=step)

    def state(self) -> dict[str, Any]:
        state = self.configured.state()
        if self.fallback is not None and self.fallback_scope is not None:
            state = {**state, "fallback": self.fallback.state(), "fallback_scope": self.fallback_scope.state()}
        return state

    def _all(self) -> list[SelectionScope]:
        return [scope for scope in (self.configured, self.warmup, self.fallback_scope) if scope is not None]

    def _in_force(self, step: int) -> SelectionScope:
        if self.warmup is not None and step < self.config.phases.full_selector_warmup_iters:
            return self.warmup
        if self.fallback_scope is not None and self.fallback is not None and self.fallback.active:
            return self.fallback_scope
        return self.configured

    def _see(self, fallback: Fallback, outcome: Outcome, step: int) -> None:
        """Decide on the next step, on every rank alike."""
        shares = torch.zeros(2, dtype=torch.float64)
        if outcome.selection is not None:
            summary = outcome.selection.summary
            shares = torch.tensor([summary["teacher_top5_share"], summary["low_C_share"]], dtype=torch.float64)
        shares = shares.to(device())
        torch.distributed.all_reduce(shares, op=torch.distributed.ReduceOp.MAX)
        top5_share, low_c_share = shares.tolist()
        if fallback.see(top5_share=top5_share, low_c_share=low_c_share):
            reasons = fallback.reasons(top5_share=top5_share, low_c_share=low_c_share)
            self.why = " and ".join(reasons) or (
                f"{top5_share:.2%} of the sampled tokens are among the teacher's best five (or K), C is below 0.5 at "
                f"{low_c_share:.2%} of the positions"
            )

    def _tell(self, in_force: SelectionScope, step: int) -> None:
        """Log where the fall-back begins to choose, and where it ends."""
        if (in_force is self.fallback_scope) == self.told:
            return
        self.told = in_force is self.fallback_scope
        line = "iteration %d: --selector %s chooses the positions again, and no longer --fallback-selector %s: %s"
        if self.told:
            line = "iteration %d: not --selector %s but --fallback-selector %s chooses the positions: %s"
        names = self.config.selection.selector, self.config.phases.fallback_selector
        logger.warning(line, step + 1, *names, self.why)
