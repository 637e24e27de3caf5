"""Which positions are kept: the flags of selection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_taopd.errors import ConfigError
from megatron_taopd.registry import resolve
from megatron_taopd.teachability.selectors import READS_NO_STATISTICS, SELECTORS, USES_COMPATIBILITY

DEFAULT_KEEP_RATIO = 0.1
DEFAULT_CARRIED_DECAY = 0.7


@dataclass(kw_only=True)
class SelectionConfig:
    """Which positions are kept (arXiv 2605.26844)."""

    selector: str = "teachability"
    """Score that ranks the positions: teachability (TA-OPD: D~ x C~), teachability_entropy, q3_teachability,
    incompatible (D~ x (1 - C~)), divergence, compatibility, entropy, tip, prefix, random, full (no
    selection), or your own as pkg.module:function."""
    keep_ratio: float | None = None
    """Share of all valid response positions of the rollout batch that is kept, in (0, 1] (default: 0.1)."""
    support_k: int = 16
    """Size K of both models' top-K supports in D and C, and of the top-K losses."""
    support_mode: Literal["exact", "upstream"] = "exact"
    """exact: D and C from real probabilities at all ids. upstream: as the released code sees them, from two
    top-K lists of a serving API, with its tie-break."""
    compatibility_scale: Literal["quantile", "raw"] | None = None
    """How C enters a score: scaled by its 5 % and 95 % quantiles like D, or as the probability mass it is
    (default: quantile, the paper's)."""
    entropy_support: Literal["full", "topk"] = "full"
    """H over the whole vocabulary, or renormalised on the student's top-K and divided by log K."""
    min_keep_per_sample: int | None = None
    """Every response keeps at least so many positions, its own best ones, over the budget if need be
    (default: 1)."""
    selection_scope: Literal["global", "carried"] = "global"
    """global: quantiles and budget over the whole rollout batch, which the student reads once more to be scored.
    carried: quantiles and the score's threshold are moving averages of earlier steps, so that scoring happens inside
    the training forward and the student reads nothing twice; the budget is then met on average, not in each step.
    The first step of a run is global, unless a warm-up has gone before. Selectors without statistics (full, prefix,
    random) stay exact."""
    carried_decay: float | None = None
    """Weight of the earlier steps in the moving averages of --selection-scope carried, in [0, 1); 0 takes the step
    before alone (default: 0.7)."""
    carried_agreement_interval: int | None = None
    """Every so many iterations, report how far --selection-scope carried agrees with global on the same batch
    (default: never)."""

    def __post_init__(self) -> None:
        resolve("selector", self.selector, SELECTORS)
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ConfigError(f"--keep-ratio {self.keep_ratio} must be in (0, 1]; 0.1 keeps a tenth")
        if self.support_k < 1:
            raise ConfigError(f"--support-k {self.support_k} must be at least 1; 16 is the method's default")
        if self.min_keep_per_sample is not None and self.min_keep_per_sample < 0:
            raise ConfigError(f"--min-keep-per-sample {self.min_keep_per_sample} must not be negative")
        self._check_carried()
        if self.selector == "full":
            for name in ("keep_ratio", "min_keep_per_sample"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"--{name.replace('_', '-')} {getattr(self, name)} has no effect with --selector "
                        "full, which keeps every position; drop it or choose another selector"
                    )
        if self.compatibility_scale is not None and (
            self.selector in SELECTORS and self.selector not in USES_COMPATIBILITY
        ):
            raise ConfigError(
                f"--compatibility-scale {self.compatibility_scale} has no effect with --selector "
                f"{self.selector}, whose score has no C; drop it or use one of "
                f"{', '.join(sorted(USES_COMPATIBILITY))}"
            )

    def _check_carried(self) -> None:
        for name in ("carried_decay", "carried_agreement_interval"):
            value = getattr(self, name)
            if value is None:
                continue
            flag = f"--{name.replace('_', '-')} {value}"
            if self.selection_scope != "carried":
                raise ConfigError(
                    f"{flag} has no effect with --selection-scope {self.selection_scope}; set that to carried, or drop "
                    "the flag"
                )
            if self.selector in READS_NO_STATISTICS:
                raise ConfigError(
                    f"{flag} has no effect with --selector {self.selector}, which reads no statistics and is exact "
                    "without a scoring pass; drop it"
                )
        if self.carried_decay is not None and not 0 <= self.carried_decay < 1:
            raise ConfigError(f"--carried-decay {self.carried_decay} must be in [0, 1); 1 would never learn anything")
        if self.carried_agreement_interval is not None and self.carried_agreement_interval < 1:
            raise ConfigError(f"--carried-agreement-interval {self.carried_agreement_interval} must be at least 1")

    def with_selector(self, selector: str) -> SelectionConfig:
        """The same budget for another selector, without the flags that have no effect there."""
        dropped: dict[str, Any] = {}
        if selector == "full":
            dropped |= dict.fromkeys(("keep_ratio", "min_keep_per_sample"))
        if selector in SELECTORS and selector not in USES_COMPATIBILITY:
            dropped |= dict.fromkeys(("compatibility_scale",))
        if selector in READS_NO_STATISTICS:
            dropped |= dict.fromkeys(("carried_decay", "carried_agreement_interval"))
        return replace(self, selector=selector, **dropped)

    @property
    def scales_compatibility(self) -> bool:
        """Whether the score has C, scaled by its quantiles."""
        return self.selector in USES_COMPATIBILITY and self.compatibility_scale != "raw"

    @property
    def resolved_carried_decay(self) -> float:
        """Weight of the earlier steps."""
        return DEFAULT_CARRIED_DECAY if self.carried_decay is None else self.carried_decay

    @property
    def resolved_keep_ratio(self) -> float:
        """The budget in use."""
        if self.selector == "full":
            return 1.0
        return DEFAULT_KEEP_RATIO if self.keep_ratio is None else self.keep_ratio

    @property
    def resolved_min_keep(self) -> int:
        """Positions that every response keeps at least."""
        return 1 if self.min_keep_per_sample is None else self.min_keep_per_sample
