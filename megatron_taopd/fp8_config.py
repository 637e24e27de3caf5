"""Flags of FP8: in the layers of student and teacher, named as in Megatron, and in the LM heads that score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_taopd.errors import ConfigError

Fp8Format = Literal["e4m3", "hybrid"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
DEFAULT_RECIPE: Fp8Recipe = "tensorwise"

_OF_DELAYED = {
    "fp8_margin": "its scales leave this many powers of two unused",
    "fp8_amax_history_len": "it looks back over so many passes",
    "fp8_amax_compute_algo": "it picks from its history",
}
_BF16_COUNTS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")


@dataclass(frozen=True, kw_only=True)
class Fp8Settings:
    """FP8 in the layers of one model, checked for itself."""

    format: Fp8Format
    recipe: Fp8Recipe
    prefix: str
    """``--`` or ``--teacher-``, as its flags begin."""
    further: dict[str, Any]
    """Fields of TransformerConfig beside ``fp8`` and ``fp8_recipe``."""

    @property
    def flag(self) -> str:
        """What turned it on, as messages show it."""
        return f"{self.prefix}fp8-format {self.format}"

    @property
    def param_gather(self) -> bool:
        """Weights are stored in FP8."""
        return bool(self.further.get("fp8_param"))

    @property
    def alignment(self) -> int:
        """Rows and columns of FP8 products are multiples of it, as in Megatron."""
        return 32 if self.recipe == "mxfp8" else 16

    def transformer_fields(self) -> dict[str, Any]:
        """Fields of TransformerConfig."""
        return {"fp8": self.format, "fp8_recipe": self.recipe, **self.further}


@dataclass(kw_only=True)
class Fp8Config:
    """FP8 in the layers of the student (or the only model), through Transformer Engine. Named as in Megatron."""

    fp8_format: Fp8Format | None = None
    """FP8 for the student's layers: e4m3 throughout, or hybrid with e5m2 for gradients. The LM head's flag is
    --score-head-precision, the teacher's --teacher-fp8-format. Refused without Transformer Engine or FP8 units."""
    fp8_recipe: Fp8Recipe | None = None
    """Scales of --fp8-format (default there: tensorwise): of earlier passes (delayed), of each tensor, of blocks
    (Hopper and newer), of 32 values in the hardware's own format (mxfp8: Blackwell)."""
    fp8_param_gather: bool = False
    """Store and gather the weights of the layers in FP8; training wants --use-distributed-optimizer for it."""
    fp8_margin: int | None = None
    """Powers of two that --fp8-recipe delayed leaves unused (default: 0)."""
    fp8_amax_history_len: int | None = None
    """Passes that --fp8-recipe delayed looks back over (default: 1)."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] | None = None
    """What --fp8-recipe delayed takes from its history (default: most_recent)."""
    fp8_wgrad: bool = True
    """With --fp8-recipe delayed: gradients of weights in FP8 too."""
    first_last_layers_bf16: bool = False
    """Leave the first and the last layers out of FP8."""
    num_layers_at_start_in_bf16: int | None = None
    """How many of the first, with --first-last-layers-bf16 (default: 1)."""
    num_layers_at_end_in_bf16: int | None = None
    """How many of the last, with --first-last-layers-bf16 (default: 1)."""

    def __post_init__(self) -> None:
        self.fp8_settings()

    def fp8_settings(self) -> Fp8Settings | None:
        """What the layers are told; None without FP8.

        Raises:
            ConfigError: a setting has no effect, or contradicts another.
        """
        return _settings(self, prefix="--")

    @property
    def token_alignment(self) -> int:
        """Tokens that a rank's micro-batch must be a multiple of while the model is trained."""
        settings = self.fp8_settings()
        return 1 if settings is None else settings.alignment


@dataclass(kw_only=True)
class TeacherFp8Config:
    """FP8 in the layers of the teacher, through Transformer Engine: it reads and is not trained."""

    teacher_fp8_format: Fp8Format | None = None
    """FP8 for the teacher's layers (hybrid differs in gradients alone, which a teacher has none of)."""
    teacher_fp8_recipe: Fp8Recipe | None = None
    """Scales of --teacher-fp8-format (default there: tensorwise). delayed is refused: it scales by what other texts
    needed."""
    teacher_fp8_param_gather: bool = False
    """Store the weights of the teacher's layers in FP8: half the memory of bf16."""
    teacher_first_last_layers_bf16: bool = False
    """Leave the teacher's first and last layers out of FP8."""
    teacher_num_layers_at_start_in_bf16: int | None = None
    """How many of the first, with --teacher-first-last-layers-bf16 (default: 1)."""
    teacher_num_layers_at_end_in_bf16: int | None = None
    """How many of the last, with --teacher-first-last-layers-bf16 (default: 1)."""

    def __post_init__(self) -> None:
        self.fp8_settings()

    def fp8_settings(self) -> Fp8Settings | None:
        """What the teacher's layers are told; None without FP8.

        Raises:
            ConfigError: a setting has no effect, or contradicts another.
        """
        settings = _settings(self, prefix="--teacher-")
        if settings is not None:
            refuse_delayed_without_training(settings)
        return settings


def _settings(config: Fp8Config | TeacherFp8Config, *, prefix: str) -> Fp8Settings | None:
    def get(name: str) -> Any:
        return getattr(config, prefix.strip("-").replace("-", "_") + "_" * (prefix != "--") + name, None)

    def flag(name: str) -> str:
        return prefix + name.replace("_", "-")

    wgrad = get("fp8_wgrad") is not False
    given = {name: get(name) for name in ("fp8_recipe", *_OF_DELAYED, *_BF16_COUNTS) if get(name) is not None}
    given |= {name: True for name in ("fp8_param_gather", "first_last_layers_bf16") if get(name)}
    if get("fp8_format") is None:
        if given or not wgrad:
            name, value = next(iter(given.items()), ("no_fp8_wgrad", True))
            shown = flag(name) if value is True else f"{flag(name)} {value}"
            raise ConfigError(f"{shown} has no effect without {flag('fp8_format')}; set that too or drop this")
        return None
    recipe: Fp8Recipe = get("fp8_recipe") or DEFAULT_RECIPE
    if recipe != "delayed":
        for name, meaning in _OF_DELAYED.items():
            if name in given:
                raise ConfigError(
                    f"{flag(name)} {given[name]} has no effect with {flag('fp8_recipe')} {recipe}: it is for delayed "
                    f"scaling alone ({meaning}); drop it"
                )
        if not wgrad:
            raise ConfigError(
                f"--no-fp8-wgrad has no effect with --fp8-recipe {recipe}: megatron-core hands it to delayed scaling "
                "alone; drop it or use --fp8-recipe delayed"
            )
    elif get("first_last_layers_bf16"):
        raise ConfigError(
            f"{flag('first_last_layers_bf16')} cannot be combined with {flag('fp8_recipe')} delayed, whose history "
            f"spans all layers; use {flag('fp8_recipe')} tensorwise or drop it"
        )
    for name in _BF16_COUNTS:
        if name in given and not get("first_last_layers_bf16"):
            raise ConfigError(
                f"{flag(name)} {given[name]} has no effect without {flag('first_last_layers_bf16')}; set that too"
            )
        if given.get(name, 0) < 0:
            raise ConfigError(f"{flag(name)} {given[name]} must not be negative")
    if given.get("fp8_margin", 0) < 0:
        raise ConfigError(f"{flag('fp8_margin')} {given['fp8_margin']} must not be negative")
    if given.get("fp8_amax_history_len", 1) < 1:
        raise ConfigError(f"{flag('fp8_amax_history_len')} {given['fp8_amax_history_len']} must be at least 1")
    further = {name: value for name, value in given.items() if name not in ("fp8_recipe", "fp8_param_gather")}
    if get("fp8_param_gather"):
        further["fp8_param"] = True
    if not wgrad:
        further["fp8_wgrad"] = False
    return Fp8Settings(format=get("fp8_format"), recipe=recipe, prefix=prefix, further=further)


def refuse_delayed_without_training(settings: Fp8Settings) -> None:
    """Raises:
    ConfigError: delayed scaling of a model that is not trained.
    """
    if settings.recipe == "delayed":
        raise ConfigError(
            f"{settings.prefix}fp8-recipe delayed scales by the maxima of earlier passes, and a model that is only "
            f"read has none that fit: values above them are cut off; use {settings.prefix}fp8-recipe tensorwise"
        )


@dataclass(kw_only=True)
class ScoreHeadConfig:
    """Number format of the LM heads while rows are scored. The loss always has the model's own."""

    score_head_precision: Literal["model", "fp8"] = "model"
    """fp8: D, C and all other statistics from an FP8 product with one scale a row, for GPUs that have FP8 units (a CPU
    emulates it, slower). Slower on an H200, see docs/gpu.md. Needs no Transformer Engine."""
    score_head_stages: Literal[1, 2] | None = None
    """2 (default of fp8): both models' 2K best ids of the FP8 product are computed again in the model's format, so that
    D, C and what is kept are as with --score-head-precision model. 1: FP8 alone."""

    def __post_init__(self) -> None:
        if self.score_head_stages is not None and self.score_head_precision != "fp8":
            raise ConfigError(
                f"--score-head-stages {self.score_head_stages} has no effect with --score-head-precision "
                f"{self.score_head_precision}; set --score-head-precision fp8 or drop it"
            )

    @property
    def stages(self) -> int:
        """0: the model's own format; else how many."""
        return 0 if self.score_head_precision == "model" else self.score_head_stages or 2
