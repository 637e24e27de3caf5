"""Flags of what a training run watches and writes beside its loss. Nothing here imports Megatron."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from megatron_taopd.errors import ConfigError
from megatron_taopd.registry import resolve
from megatron_taopd.teachability import SELECTORS, SelectionConfig

DEFAULT_INTERVAL = 10
DEFAULT_SELECTORS = ("teachability", "entropy", "divergence", "tip", "incompatible", "random")
DEFAULT_RESPONSES = 8


@dataclass(kw_only=True)
class MonitorConfig:
    """What is watched beside the loss."""

    monitor_interval: int | None = None
    """Every so many iterations, compare the kept positions with those that other selectors would keep; 0: never
    (default: 10). All other figures are told in every iteration."""
    monitor_selectors: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """A selector to compare with; the flag again for each (default: teachability, entropy, divergence, tip,
    incompatible and random, without the one in use)."""
    dump_kept_interval: int | None = None
    """Every so many iterations, write the tokens of some responses with their statistics and which of them are kept
    into --log-dir (default: never)."""
    dump_kept_responses: int | None = None
    """Responses that --dump-kept-interval writes at most, spread evenly over the batch (default: 8)."""

    def __post_init__(self) -> None:
        if self.monitor_interval is not None and self.monitor_interval < 0:
            raise ConfigError(f"--monitor-interval {self.monitor_interval} must not be negative; 0 never compares")
        if self.monitor_selectors and self.monitor_interval == 0:
            raise ConfigError(
                f"--monitor-selectors {' '.join(self.monitor_selectors)} has no effect with --monitor-interval 0; drop "
                "one of them"
            )
        for name in self.monitor_selectors:
            resolve("selector", name, SELECTORS)
            if name == "full":
                raise ConfigError("--monitor-selectors full keeps every position, so that there is nothing to compare")
        if self.dump_kept_responses is not None and self.dump_kept_interval is None:
            raise ConfigError(
                f"--dump-kept-responses {self.dump_kept_responses} has no effect without --dump-kept-interval; set "
                "that too"
            )
        for name in ("dump_kept_interval", "dump_kept_responses"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")

    def check_against(self, selection: SelectionConfig, *, log_dir: str | None) -> None:
        """Refuse what would compare or write nothing.

        Raises:
            ConfigError: as said.
        """
        if selection.selector == "full":
            for name in ("monitor_interval", "monitor_selectors"):
                value = getattr(self, name)
                if value not in (None, []):
                    raise ConfigError(
                        f"--{name.replace('_', '-')} {value} has no effect with --selector full, which keeps every "
                        "position; drop it"
                    )
        if self.dump_kept_interval is not None and log_dir is None:
            raise ConfigError(
                f"--dump-kept-interval {self.dump_kept_interval} has no effect without --log-dir, into which it "
                "writes; set that too"
            )

    def compares(self, iteration: int) -> bool:
        """Whether to compare selectors in this iteration, counted from 1."""
        interval = DEFAULT_INTERVAL if self.monitor_interval is None else self.monitor_interval
        return interval > 0 and iteration % interval == 0

    def selectors_beside(self, selector: str) -> list[str]:
        """Those to compare with."""
        return self.monitor_selectors or [name for name in DEFAULT_SELECTORS if name != selector]
