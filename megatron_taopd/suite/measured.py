"""A set of contexts or tasks on which trained students are measured."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_taopd.errors import ConfigError

KL_MEASURES = ("kl_forward", "kl_reverse")

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
    "kl_forward": _measure("forward KL", "nats/token", "lower"),
    "kl_reverse": _measure("reverse KL", "nats/token", "lower"),
    "mean_C": _measure("teacher mass on the student's top-K", "share", None),
    "low_C_share": _measure("positions with C below 0.5", "share", None),
    "tokens_supervised": _measure("tokens supervised", "tokens", None),
    "keep_ratio": _measure("share of tokens supervised", "share", None),
    "wall_time": _measure("training time", "s", "lower"),
    "peak_memory": _measure("peak memory", "bytes", "lower"),
    "train_C_q05": _measure("5 % quantile of C in training", "share", None),
    "train_low_C_share": _measure("positions with C below 0.5 in training", "share", None),
}
"""What a table has, in its order: title, unit, and whether a lower or a higher number is better."""


def higher_is_better(measure: str) -> bool:
    """Whether more of a measure is better."""
    return MEASURES[measure]["better"] == "higher"


@dataclass(frozen=True, kw_only=True)
class MeasuredSet:
    """Held-out or validation set."""

    rollouts: str
    """Recorded rollouts: contexts that stay the same for every run."""

    @classmethod
    def from_yaml(cls, content: Any, where: str) -> MeasuredSet:
        """As a suite file has it.

        Raises:
            ConfigError: a key is unknown, or there is nothing to measure.
        """
        from megatron_taopd.suite.config import known_keys

        content = known_keys(content, ("rollouts",), where)
        if not isinstance(content.get("rollouts"), str):
            raise ConfigError(f"{where}: rollouts is missing: a JSONL file that `taopd rollout` wrote")
        return cls(rollouts=content["rollouts"])

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what a learning rate can be chosen by."""
        return KL_MEASURES

    @property
    def default_measure(self) -> str:
        """What it is chosen by, unless said otherwise."""
        return self.measures[0]

    def check_apart_from(self, held_out: MeasuredSet, where: str) -> None:
        """Refuse a validation set that is the held-out set.

        Raises:
            ConfigError: both read the same file, or files of the same content.
        """
        mine, other = Path(self.rollouts), Path(held_out.rollouts)
        same = mine.resolve() == other.resolve()
        if not same and mine.is_file() and other.is_file():
            same = fingerprint(mine) == fingerprint(other)
        if same:
            raise ConfigError(
                f"{where}: validation and held_out are the same contexts ({self.rollouts}, {held_out.rollouts}); a "
                "learning rate must not be chosen on what is reported"
            )


def fingerprint(path: str | Path) -> str:
    """First 16 digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]
