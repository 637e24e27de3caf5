"""Which loss is applied at the kept positions: its flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_taopd.errors import ConfigError
from megatron_taopd.losses.functions import LOSSES
from megatron_taopd.registry import resolve

ImportanceRatio = Literal["none", "token", "prefix"]
DEFAULT_IMPORTANCE_RATIO_CLIP = 2.0
TOPK_LOSSES = ("topk_reverse_kl", "topk_forward_kl")


@dataclass(kw_only=True)
class LossConfig:
    """The loss at a kept position."""

    loss: str = "reverse_kl"
    """reverse_kl (whole vocabulary; what sampled_reverse_kl estimates, without its sampling noise),
    forward_kl, jsd, topk_reverse_kl and topk_forward_kl (top-K ids and one tail bucket), sampled_reverse_kl
    (the paper's policy gradient on the sampled token), or your own as pkg.module:function."""
    loss_support: Literal["student", "teacher", "union"] | None = None
    """Ids that a top-K loss tells apart: the student's top-K, the teacher's, or both (default: student)."""
    jsd_beta: float | None = None
    """Weight of the teacher in jsd's mixture, in [0, 1]: 0 is forward_kl, 1 reverse_kl (default: 0.5)"""
    loss_ratio_clip: float | None = None
    """Clip the probability ratio of sampled_reverse_kl to 1 +- this, as PPO does (default: not clipped)."""
    loss_normalization: Literal["kept", "valid"] = "kept"
    """Divide the summed loss by the kept or by all valid positions of the global batch."""
    importance_ratio: ImportanceRatio = "none"
    """Weigh the loss of a position for responses that another policy than the student wrote (older weights of
    --rollout-engine openai, recorded responses). prefix: by the ratio of the probabilities of the tokens before it,
    right for losses that are functions of the context; token: by that of the token itself."""
    importance_ratio_clip: float | None = None
    """Largest weight of --importance-ratio (default: 2)."""

    def __post_init__(self) -> None:
        resolve("loss", self.loss, LOSSES)
        if self.loss in LOSSES:
            self._refuse_without_effect("loss_support", TOPK_LOSSES)
            self._refuse_without_effect("jsd_beta", ("jsd",))
            self._refuse_without_effect("loss_ratio_clip", ("sampled_reverse_kl",))
        if self.jsd_beta is not None and not 0 <= self.jsd_beta <= 1:
            raise ConfigError(f"--jsd-beta {self.jsd_beta} must be in [0, 1]; 0.5 weighs both models alike")
        if self.loss_ratio_clip is not None and not self.loss_ratio_clip > 0:
            raise ConfigError(f"--loss-ratio-clip {self.loss_ratio_clip} must be positive; 0.2 is usual")
        if self.importance_ratio == "token" and self.loss == "sampled_reverse_kl":
            raise ConfigError(
                "--importance-ratio token would count the ratio of the sampled token twice: it is part of --loss "
                "sampled_reverse_kl; use prefix, or none with --loss-ratio-clip"
            )
        if self.importance_ratio_clip is not None:
            if self.importance_ratio == "none":
                raise ConfigError(
                    f"--importance-ratio-clip {self.importance_ratio_clip} has no effect without --importance-ratio "
                    "prefix or token"
                )
            if not self.importance_ratio_clip >= 1:
                raise ConfigError(
                    f"--importance-ratio-clip {self.importance_ratio_clip} must be at least 1, the weight of a "
                    "response that the student itself wrote; 2 is usual"
                )

    @property
    def resolved_importance_ratio_clip(self) -> float:
        """Largest weight."""
        return self.importance_ratio_clip or DEFAULT_IMPORTANCE_RATIO_CLIP

    def _refuse_without_effect(self, name: str, losses: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value is not None and self.loss not in losses:
            raise ConfigError(
                f"--{name.replace('_', '-')} {value} has no effect with --loss {self.loss}; drop it or use "
                f"--loss {' or '.join(losses)}"
            )
