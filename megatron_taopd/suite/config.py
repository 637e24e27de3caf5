"""The suite file: what is compared, at which budgets, learning rates and seeds, and what is measured.

Nothing here imports Megatron.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_taopd.config import TrainConfig
from megatron_taopd.config_file import flag_names
from megatron_taopd.errors import ConfigError
from megatron_taopd.suite.measured import MeasuredSet
from megatron_taopd.teachability.selectors import SELECTORS

KEEP = ("records", "exports", "all")
OWN_KEYS = {
    "lr": "write lr beside settings, or in a method",
    "keep_ratio": "write budgets beside settings, or in a method",
    "seed": "write seeds beside settings",
    "log_dir": "each run has its own directory below --out",
    "tensorboard_dir": "each run has its own directory below --out",
    "save": "write save_interval for checkpoints to resume from, and keep: all to keep them",
    "load": "an interrupted run resumes by itself",
    "export_hf": "write keep: exports beside settings",
    "exit_interval": "a suite stops when it is sent SIGTERM or SIGUSR1",
    "exit_duration_in_mins": "a suite stops when it is sent SIGTERM or SIGUSR1",
}
"""Keys of `taopd train` that the suite sets itself, and what to write instead."""

_KEYS = ("settings", "methods", "budgets", "seeds", "lr", "sweep", "held_out", "validation", "keep", "baseline")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """A row of the comparison."""

    name: str
    overrides: dict[str, Any]
    """Keys of `taopd train` on top of the suite's settings; ``selector`` is among them where it trains."""
    trains: bool
    """False: its student is measured as it is."""
    budgets: tuple[float | None, ...]
    """Shares of the positions that are kept; (None,) where there is nothing to choose."""
    rates: dict[float | None, tuple[float, ...]]
    """Learning rates of each budget, more than one to sweep over; empty where it does not train."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How a learning rate is chosen."""

    seeds: tuple[int, ...]
    by: str
    """Measure on the validation set."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite file, checked."""

    path: str
    text: str
    settings: dict[str, Any]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    sweep: Sweep | None
    held_out: MeasuredSet
    validation: MeasuredSet | None
    keep: str
    baseline: str | None
    """The method that the others are compared with, seed by seed."""

    def with_baseline(self, name: str) -> Suite:
        """The same suite, compared with another of its methods.

        Raises:
            ConfigError: it has no such method; the nearest name is shown.
        """
        return replace(self, baseline=_baseline(name, self.methods, f"suite {self.path}"))


def read_suite(path: str | Path) -> Suite:
    """Read a suite file.

    Raises:
        ConfigError: it is missing, is not YAML, or has a key, method or value that cannot be honoured.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"suite {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"suite {path} is not valid YAML: {error}") from error
    where = f"suite {path}"
    content = known_keys(content, _KEYS, where)
    for key in ("settings", "methods", "seeds", "held_out"):
        if not content.get(key):
            raise ConfigError(f"{where}: {key} is missing; docs/suite.md has an example")
    settings = _train_keys(content["settings"], f"{where}: settings")
    if "selector" in settings:
        raise ConfigError(f"{where}: settings: selector is what methods differ in; write it in a method")
    methods = _methods(content, where)
    held_out = MeasuredSet.from_yaml(content["held_out"], f"{where}: held_out")
    validation = None
    if content.get("validation") is not None:
        validation = MeasuredSet.from_yaml(content["validation"], f"{where}: validation")
        validation.check_apart_from(held_out, where)
    keep = content.get("keep", "records")
    if keep not in KEEP:
        raise ConfigError(f"{where}: keep: {keep!r} is none of {', '.join(KEEP)}{_near(keep, KEEP)}")
    return Suite(
        path=str(path),
        text=text,
        settings=settings,
        methods=methods,
        seeds=_seeds(content["seeds"], f"{where}: seeds"),
        sweep=_sweep(content, methods, validation, where),
        held_out=held_out,
        validation=validation,
        keep=keep,
        baseline=_baseline(content.get("baseline"), methods, where),
    )


def known_keys(content: Any, known: Iterable[str], where: str) -> dict[str, Any]:
    """A mapping that has no other keys.

    Raises:
        ConfigError: it is no mapping, or has an unknown key; the nearest name is shown.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a mapping, not {content!r}")
    known = tuple(known)
    for key in content:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{_near(key, known)}; known keys: {', '.join(known)}")
    return content


def _near(name: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _train_keys(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a mapping of `taopd train` keys, not {content!r}")
    named = flag_names(content, TrainConfig, where=where)
    for key, instead in OWN_KEYS.items():
        if key in named:
            raise ConfigError(f"{where}: {key} is set by the suite for each run; {instead}")
    return named


def _methods(content: Mapping[str, Any], where: str) -> tuple[Method, ...]:
    if not isinstance(content["methods"], dict):
        raise ConfigError(f"{where}: methods must be a mapping of names, such as `teachability: {{}}`")
    given = {str(name): {} if own is None else own for name, own in content["methods"].items()}
    methods = tuple(_method(name, own, content, f"{where}: methods: {name}") for name, own in given.items())
    if "budgets" in content and all(m.budgets == (None,) or "budgets" in given[m.name] for m in methods):
        raise ConfigError(f"{where}: budgets has no effect: no method takes its budgets from there; drop it")
    return methods


def _method(name: str, own: Any, content: Mapping[str, Any], where: str) -> Method:
    if not isinstance(own, dict):
        raise ConfigError(f"{where} must be a mapping of `taopd train` keys, lr, budgets and train, not {own!r}")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{where}: a name is a directory, too; use letters, digits, '-', '_' and '.'")
    overrides = _train_keys({k: v for k, v in own.items() if k not in ("lr", "budgets", "train")}, where)
    if own.get("train", True) is False:
        for key in ("lr", "budgets", "selector"):
            if key in own:
                raise ConfigError(f"{where}: {key} has no effect with train: false; drop it")
        return Method(name=name, overrides=overrides, trains=False, budgets=(None,), rates={})
    if own.get("train", True) is not True:
        raise ConfigError(f"{where}: train must be true or false, not {own['train']!r}")
    if "selector" not in overrides:
        if name not in SELECTORS:
            raise ConfigError(
                f"{where}: unknown method{_near(name, SELECTORS)}; selectors are {', '.join(SELECTORS)}, and a method "
                "of another name says which: `selector: …` (or `train: false` for a student measured as it is)"
            )
        overrides = {"selector": name, **overrides}
    if overrides["selector"] == "full":
        if "budgets" in own:
            raise ConfigError(f"{where}: budgets has no effect with selector full, which keeps every position")
        budgets: tuple[float | None, ...] = (None,)
    else:
        budgets = _budgets(own.get("budgets", content.get("budgets")), where)
    if "lr" not in own and "lr" not in content:
        raise ConfigError(f"{where}: no learning rate; write lr here, or beside settings for all methods")
    return Method(
        name=name,
        overrides=overrides,
        trains=True,
        budgets=budgets,
        rates=_rates(own.get("lr", content.get("lr")), budgets, where),
    )


def _budgets(value: Any, where: str) -> tuple[float, ...]:
    if value is None:
        raise ConfigError(f"{where}: no budgets; write for example budgets: [0.05, 0.1], here or beside settings")
    budgets = tuple(number(v, f"{where}: budgets") for v in (value if isinstance(value, list) else [value]))
    for budget in budgets:
        if not 0 < budget <= 1:
            raise ConfigError(f"{where}: budgets: {budget:g} must be in (0, 1]; 0.1 keeps a tenth")
    if not budgets or len(set(budgets)) < len(budgets):
        raise ConfigError(f"{where}: budgets: {list(budgets)} must be different shares, at least one")
    return budgets


def _rates(value: Any, budgets: tuple[float | None, ...], where: str) -> dict[float | None, tuple[float, ...]]:
    """A rate or a list of them, for all budgets alike or by budget."""
    if not isinstance(value, dict):
        rates = _rate_list(value, where)
        return {budget: rates for budget in budgets}
    by_budget = {number(key, f"{where}: lr"): _rate_list(rates, where) for key, rates in value.items()}
    if budgets == (None,):
        raise ConfigError(f"{where}: lr by budget has no effect, since every position is kept; write one lr")
    if set(by_budget) != set(budgets):
        raise ConfigError(
            f"{where}: lr names the budgets {sorted(by_budget)} and the budgets are {sorted(b for b in budgets if b)}; "
            "name each of them"
        )
    return {budget: by_budget[budget] for budget in budgets if budget is not None}


def _rate_list(value: Any, where: str) -> tuple[float, ...]:
    rates = tuple(number(v, f"{where}: lr") for v in (value if isinstance(value, list) else [value]))
    if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
        raise ConfigError(f"{where}: lr: {value} must be positive and, in a list, different")
    return tuple(sorted(rates))


def number(value: Any, where: str) -> float:
    """A finite number; YAML reads 1e-4 as text.

    Raises:
        ConfigError: it is none.
    """
    try:
        result = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result):
        raise ConfigError(f"{where}: {value!r} is not a number")
    return result


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or any(type(v) is not int or v < 0 for v in value):
        raise ConfigError(f"{where}: {value!r} must be a list of whole numbers, such as [1, 2, 3]")
    if len(set(value)) < len(value):
        raise ConfigError(f"{where}: {value} names a seed twice")
    return tuple(value)


def _sweep(
    content: Mapping[str, Any], methods: tuple[Method, ...], validation: MeasuredSet | None, where: str
) -> Sweep | None:
    counts = {(m.name, budget): len(rates) for m in methods for budget, rates in m.rates.items()}
    if set(counts.values()) <= {1}:
        for key in ("sweep", "validation"):
            if content.get(key) is not None:
                raise ConfigError(f"{where}: {key} has no effect, since no lr is a list to choose from; drop it")
        return None
    (few, fewest), (many, most) = (pick(counts.items(), key=lambda item: item[1]) for pick in (min, max))
    if fewest != most:
        raise ConfigError(
            f"{where}: {_cell(few)} has {fewest} learning rates to choose from and {_cell(many)} {most}; every method "
            "gets the same effort, so give each equally many"
        )
    given = known_keys(content.get("sweep") or {}, ("seeds", "by"), f"{where}: sweep")
    if "seeds" not in given:
        raise ConfigError(f"{where}: lr is a list, so write sweep: {{seeds: [...]}}, the seeds that choose from it")
    if validation is None:
        raise ConfigError(
            f"{where}: lr is a list, so write validation: {{rollouts: FILE}}; learning rates are not chosen on held_out"
        )
    by = str(given.get("by", validation.default_measure))
    if by not in validation.measures:
        raise ConfigError(
            f"{where}: sweep: by: {by!r} is not measured on the validation set{_near(by, validation.measures)}; "
            f"there: {', '.join(validation.measures)}"
        )
    return Sweep(seeds=_seeds(given["seeds"], f"{where}: sweep: seeds"), by=by)


def _cell(cell: tuple[str, float | None]) -> str:
    name, budget = cell
    return name if budget is None else f"{name} at {budget:g}"


def _baseline(given: Any, methods: tuple[Method, ...], where: str) -> str | None:
    names = [method.name for method in methods]
    if given is None:
        return "full" if "full" in names else None
    if given not in names:
        raise ConfigError(f"{where}: baseline: {given!r} is none of the methods{_near(given, names)}")
    return str(given)
