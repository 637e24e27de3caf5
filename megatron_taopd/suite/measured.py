"""A set of contexts or tasks on which trained students are measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_taopd.errors import ConfigError
from megatron_taopd.files import sha256_of_file

KL_MEASURES = ("kl_forward", "kl_reverse")
ACCURACY = "accuracy"
"""Mean over a set's tasks; of one of them it is ``accuracy/NAME``."""

TRAINING_MEASURES = {
    "tokens_supervised": "tokens_supervised",
    "keep_ratio": "keep_ratio",
    "wall_time": "wall_time",
    "train_C_q05": "C_q05",
    "train_low_C_share": "low_C_share",
}
"""Measures that are read from a record's ``training``, and their names there."""


def _measure(title: str, unit: str, better: str | None) -> dict[str, str | None]:
    return {"title": title, "unit": unit, "better": better}


MEASURES: dict[str, dict[str, str | None]] = {
    ACCURACY: _measure("accuracy", "share", "higher"),
    "kl_forward": _measure("forward KL", "nats/token", "lower"),
    "kl_reverse": _measure("reverse KL", "nats/token", "lower"),
    "mean_C": _measure("teacher mass on the student's top-K", "share", None),
    "C_q05": _measure("5 % quantile of C", "share", None),
    "low_C_share": _measure("positions with C below 0.5", "share", None),
    "tokens_supervised": _measure("tokens supervised", "tokens", None),
    "keep_ratio": _measure("share of tokens supervised", "share", None),
    "wall_time": _measure("training time", "s", "lower"),
    "peak_memory": _measure("peak memory", "bytes", "lower"),
    "train_C_q05": _measure("5 % quantile of C in training", "share", None),
    "train_low_C_share": _measure("positions with C below 0.5 in training", "share", None),
}
"""What a table has, in its order: title, unit, and whether a lower or a higher number is better."""


def description(measure: str) -> dict[str, str | None]:
    """Title, unit and better direction of a measure."""
    if measure.startswith(f"{ACCURACY}/"):
        return _measure(f"accuracy, {measure.split('/', 1)[1]}", "share", "higher")
    return MEASURES[measure]


def is_measure(name: str) -> bool:
    """Whether a table has a column for it."""
    return name in MEASURES or name.startswith(f"{ACCURACY}/")


def higher_is_better(measure: str) -> bool:
    """Whether more of a measure is better."""
    return description(measure)["better"] == "higher"


@dataclass(frozen=True, kw_only=True)
class MeasuredSet:
    """Held-out or validation set."""

    rollouts: str | None
    """Recorded rollouts: contexts that stay the same for every run."""
    tasks: tuple[str, ...]
    """Tasks that students answer, as `taopd eval --task` names them."""

    @classmethod
    def from_yaml(cls, content: Any, where: str) -> MeasuredSet:
        """As a suite file has it.

        Raises:
            ConfigError: a key is unknown, or there is nothing to measure.
        """
        from megatron_taopd.suite.config import known_keys

        content = known_keys(content, ("rollouts", "tasks"), where)
        rollouts, tasks = content.get("rollouts"), content.get("tasks") or []
        tasks = [tasks] if isinstance(tasks, str) else tasks
        if (
            not isinstance(rollouts, str | None)
            or not isinstance(tasks, list)
            or not all(type(t) is str for t in tasks)
        ):
            raise ConfigError(
                f"{where}: rollouts is the name of a file, and tasks a list of what taopd eval --task takes"
            )
        if rollouts is None and not tasks:
            raise ConfigError(
                f"{where}: nothing is measured; write rollouts: FILE (JSONL of `taopd rollout`, for the divergence "
                "from the teacher on fixed contexts), tasks: [...] (as taopd eval --task), or both"
            )
        return cls(rollouts=rollouts, tasks=tuple(tasks))

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what a learning rate can be chosen by."""
        return (KL_MEASURES if self.rollouts is not None else ()) + ((ACCURACY,) if self.tasks else ())

    @property
    def default_measure(self) -> str:
        """What it is chosen by, unless said otherwise."""
        return self.measures[0]

    def check_apart_from(self, held_out: MeasuredSet, where: str) -> None:
        """Refuse a validation set that is the held-out set.

        Raises:
            ConfigError: both have the same file, files of the same content, or the same task.
        """
        both = set(self.tasks) & set(held_out.tasks)
        if self.rollouts is not None and held_out.rollouts is not None:
            mine, other = Path(self.rollouts), Path(held_out.rollouts)
            same = mine.resolve() == other.resolve()
            if not same and mine.is_file() and other.is_file():
                same = fingerprint(mine) == fingerprint(other)
            both |= {self.rollouts} if same else set()
        if both:
            raise ConfigError(
                f"{where}: validation and held_out both have {', '.join(sorted(both))}; a learning rate must not be "
                "chosen on what is reported"
            )


def fingerprint(path: str | Path) -> str:
    """First 16 digits of a file's SHA-256."""
    return sha256_of_file(path)[:16]
