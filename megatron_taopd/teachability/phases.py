"""When another selector than the configured one is in force: a warm-up, and a fall-back where D and C mislead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_taopd.errors import ConfigError
from megatron_taopd.registry import resolve
from megatron_taopd.teachability.config import SelectionConfig
from megatron_taopd.teachability.selectors import SELECTORS

DEFAULT_THRESHOLD = 0.95
DEFAULT_LOW_C_SHARE = 0.5


@dataclass(kw_only=True)
class PhaseConfig:
    """Steps in which another selector chooses."""

    full_selector_warmup_iters: int = 0
    """The first iterations keep every position, as --selector full does; then --selector chooses."""
    fallback_selector: str | None = None
    """Selector that takes over while the scores mean little: full, or another one at the same --keep-ratio (default:
    none does). A step looks at the shares of the step before."""
    fallback_threshold: float | None = None
    """--fallback-selector takes over where at least this share of the sampled tokens is among the teacher's best five
    (default: 0.95)."""
    fallback_low_c_share: float | None = None
    """--fallback-selector takes over where at least this share of the positions has C below 0.5 (default: 0.5)."""
    fallback_patience: int | None = None
    """Steps in a row that must call for the fall-back before it acts, and must not before it ends (default: 1)."""

    def __post_init__(self) -> None:
        if self.full_selector_warmup_iters < 0:
            raise ConfigError(f"--full-selector-warmup-iters {self.full_selector_warmup_iters} must not be negative")
        shares = {"fallback_threshold": self.fallback_threshold, "fallback_low_c_share": self.fallback_low_c_share}
        if self.fallback_selector is None:
            for name, value in {**shares, "fallback_patience": self.fallback_patience}.items():
                if value is not None:
                    raise ConfigError(
                        f"--{name.replace('_', '-')} {value} has no effect without --fallback-selector; name one (full "
                        "keeps every position) or drop this"
                    )
            return
        resolve("selector", self.fallback_selector, SELECTORS)
        for name, value in shares.items():
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be in (0, 1]: a share of the positions")
        if self.fallback_patience is not None and self.fallback_patience < 1:
            raise ConfigError(f"--fallback-patience {self.fallback_patience} must be at least 1")

    def check_against(self, selection: SelectionConfig) -> None:
        """Refuse phases that differ in nothing from the configured selector.

        Raises:
            ConfigError: as said.
        """
        if selection.selector == "full":
            for flag, value in (
                ("--full-selector-warmup-iters", self.full_selector_warmup_iters or None),
                ("--fallback-selector", self.fallback_selector),
            ):
                if value is not None:
                    raise ConfigError(
                        f"{flag} {value} has no effect with --selector full, which keeps every position in every step; "
                        "drop one of them"
                    )
        if self.fallback_selector == selection.selector:
            raise ConfigError(
                f"--fallback-selector {self.fallback_selector} is --selector itself; name another one, or drop it"
            )


@dataclass(kw_only=True)
class Fallback:
    """Whether the fall-back is in force; moved once a step by figures that are the same on every rank."""

    threshold: float
    low_c_share: float
    patience: int
    active: bool = False
    """The next step's positions are chosen by the fall-back."""
    streak: int = 0
    """Steps in a row that called for the other state."""

    @classmethod
    def from_config(cls, config: PhaseConfig) -> Fallback:
        """Not in force."""
        return cls(
            threshold=DEFAULT_THRESHOLD if config.fallback_threshold is None else config.fallback_threshold,
            low_c_share=DEFAULT_LOW_C_SHARE if config.fallback_low_c_share is None else config.fallback_low_c_share,
            patience=1 if config.fallback_patience is None else config.fallback_patience,
        )

    def see(self, *, top5_share: float, low_c_share: float) -> bool:
        """Take in the figures of a step; whether this changed the state."""
        wanted = bool(self.reasons(top5_share=top5_share, low_c_share=low_c_share))
        self.streak = 0 if wanted == self.active else self.streak + 1
        if self.streak < self.patience:
            return False
        self.active, self.streak = wanted, 0
        return True

    def reasons(self, *, top5_share: float, low_c_share: float) -> list[str]:
        """What calls for the fall-back, for the log; nothing if nothing does."""
        reasons = []
        if top5_share >= self.threshold:
            reasons.append(
                f"{top5_share:.2%} of the sampled tokens are among the teacher's best five, or K below that "
                f"(--fallback-threshold {self.threshold})"
            )
        if low_c_share >= self.low_c_share:
            reasons.append(
                f"C is below 0.5 at {low_c_share:.2%} of the positions (--fallback-low-c-share {self.low_c_share})"
            )
        return reasons

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"active": self.active, "streak": self.streak}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken."""
        self.active, self.streak = saved["active"], saved["streak"]
