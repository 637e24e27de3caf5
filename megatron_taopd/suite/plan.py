"""The runs of a suite: which there are, their directories, and the configuration of each.

A cell is a method at a budget; a run is a cell with a learning rate and a seed. Nothing here imports Megatron.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_taopd.cli import parse
from megatron_taopd.config import TrainConfig
from megatron_taopd.config_file import as_words, flat_values
from megatron_taopd.errors import ConfigError, DataError, TaopdError
from megatron_taopd.suite.config import Method, Suite
from megatron_taopd.suite.measured import MeasuredSet, fingerprint

if TYPE_CHECKING:
    from megatron_taopd.evaluation.tasks import Task

HELD_OUT, VALIDATION = "held_out", "validation"

CHANGES_NOTHING = {
    "async_save",
    "distributed_timeout_minutes",
    "export_hf",
    "keep_last_checkpoints",
    "load",
    "log_dir",
    "log_interval",
    "save",
    "save_interval",
}
"""Keys that may differ between two starts of a suite: no number of a run depends on them."""


@dataclass(frozen=True, eq=False)
class Cell:
    """A method at a budget; its name and budget say which."""

    method: Method
    budget: float | None

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates to choose from; empty where it does not train."""
        return self.method.rates.get(self.budget, ())

    @property
    def key(self) -> tuple[str, float | None]:
        """Name of the method and budget."""
        return self.method.name, self.budget

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cell) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        return self.method.name if self.budget is None else f"{self.method.name} {self.budget:g}"


@dataclass(frozen=True)
class Run:
    """A cell with a learning rate (None where it does not train) and a seed."""

    cell: Cell
    rate: float | None
    seed: int

    @property
    def id(self) -> str:
        """Its directory below ``runs``."""
        parts = [self.cell.method.name]
        if self.cell.budget is not None:
            parts.append(f"budget-{self.cell.budget:g}")
        if self.rate is not None:
            parts.append(f"lr-{self.rate:g}")
        return "/".join([*parts, f"seed-{self.seed}"])

    def __str__(self) -> str:
        rate = "" if self.rate is None else f" lr {self.rate:g}"
        return f"{self.cell}{rate} seed {self.seed}"


class Plan:
    """All runs of a suite below one directory."""

    def __init__(self, suite: Suite, out: str | Path) -> None:
        self.suite = suite
        self.out = Path(out)
        self._configs: dict[Cell, TrainConfig] = {}
        self._fingerprints: dict[str, str] = {}
        self._models: dict[str, str] = {}
        self.tasks: dict[str, list[Task]] = {HELD_OUT: [], VALIDATION: []}
        """Of each set, once they are loaded."""

    @cached_property
    def cells(self) -> list[Cell]:
        """In the order of the file."""
        return [Cell(method, budget) for method in self.suite.methods for budget in method.budgets]

    @cached_property
    def sets(self) -> dict[str, MeasuredSet]:
        """What there is to measure on."""
        sets = {HELD_OUT: self.suite.held_out, VALIDATION: self.suite.validation}
        return {name: measured for name, measured in sets.items() if measured is not None}

    def sweep_runs(self) -> list[Run]:
        """Runs that learning rates are chosen from; empty without a sweep."""
        if self.suite.sweep is None:
            return []
        seeds = self.suite.sweep.seeds
        return [Run(cell, rate, seed) for seed in seeds for cell in self.cells for rate in cell.rates]

    def cell_sweep_runs(self, cell: Cell) -> list[Run]:
        """Those of one cell."""
        seeds = () if self.suite.sweep is None else self.suite.sweep.seeds
        return [Run(cell, rate, seed) for rate in cell.rates for seed in seeds]

    def main_runs(self, chosen: Mapping[Cell, float | None]) -> Iterator[Run]:
        """Runs that the table is made of, of the cells whose learning rate is known; a seed after the other."""
        for seed in self.suite.seeds:
            for cell in self.cells:
                if cell in chosen:
                    yield Run(cell, chosen[cell], seed)

    @property
    def seeds_of_undecided(self) -> tuple[int, ...]:
        """Whose runs are still to come for a cell without a chosen rate; those of the sweep are sweep runs already."""
        swept = () if self.suite.sweep is None else self.suite.sweep.seeds
        return tuple(seed for seed in self.suite.seeds if seed not in swept)

    def sets_of(self, run: Run) -> list[str]:
        """What a run is measured on. A seed that only chooses learning rates never sees the held-out set."""
        sets = []
        if run.seed in self.suite.seeds:
            sets.append(HELD_OUT)
        if self.suite.sweep is not None and run.seed in self.suite.sweep.seeds and run.cell.method.trains:
            sets.append(VALIDATION)
        return sets

    def directory(self, run: Run) -> Path:
        """Where everything of a run is."""
        return self.out / "runs" / run.id

    def config(self, run: Run) -> TrainConfig:
        """What `taopd train` is told.

        Raises:
            ConfigError: a value or combination is refused.
        """
        names = {"{seed}": str(run.seed), "{run}": str(self.directory(run))}
        config: TrainConfig = _filled(self.cell_config(run.cell), names)
        rate = config.optimization.lr if run.rate is None else run.rate
        return replace(config, seed=run.seed, optimization=replace(config.optimization, lr=rate))

    def cell_config(self, cell: Cell) -> TrainConfig:
        """Parsed once, with ``{seed}`` and ``{run}`` in its texts, and some learning rate."""
        if cell not in self._configs:
            self._configs[cell] = self._parse(cell)
        return self._configs[cell]

    def _parse(self, cell: Cell) -> TrainConfig:
        suite, method = self.suite, cell.method
        values = {**suite.settings, **method.overrides, "log_dir": "{run}"}
        if cell.budget is not None:
            values["keep_ratio"] = cell.budget
        if cell.rates:
            values["lr"] = cell.rates[-1]
        if not method.trains:
            values |= dict.fromkeys(("save_interval", "keep_last_checkpoints", "async_save"))
        elif values.get("save_interval") is not None or suite.keep == "all":
            values["save"] = values["load"] = "{run}/checkpoints"
        if method.trains and suite.keep in ("exports", "all"):
            values["export_hf"] = "{run}/hf"
        where = f"suite {suite.path}: {cell}"
        words = [word for name, value in values.items() for word in as_words(name, value, where=where)]
        try:
            return parse(TrainConfig, words, name="train")
        except SystemExit as error:
            raise ConfigError(f"{where}: taopd train refuses these settings (above)") from error
        except TaopdError as error:
            raise ConfigError(f"{where}: {error}") from error

    def check(self) -> None:
        """Parse the settings of every cell and look for the files of every run, so that nothing is refused hours later.

        Raises:
            ConfigError: settings are refused, or a model directory is missing.
            ModelError: a directory holds no model.
            DataError: a data file is missing.
        """
        for name, measured in self.sets.items():
            if measured.rollouts is not None and not Path(measured.rollouts).is_file():
                raise DataError(f"suite {self.suite.path}: {name}: rollouts {measured.rollouts} is no file")
        for cell in self.cells:
            sweep = () if self.suite.sweep is None or not cell.rates else self.suite.sweep.seeds
            for seed in (*self.suite.seeds, *sweep):
                for rate in cell.rates or (None,):
                    self._check_paths(Run(cell, rate, seed))

    def _check_paths(self, run: Run) -> None:
        config = self.config(run)
        where = f"suite {self.suite.path}: {run}"
        for what, path in self._models_of(run).items():
            if not Path(path).is_dir():
                raise ConfigError(f"{where}: {what} {path} is no directory")
            self._model_fingerprint(path)
        for what, file in {"prompt_data": config.data.prompt_data, "rollout_data": config.rollout.rollout_data}.items():
            if file is not None and not Path(file).is_file():
                raise DataError(f"{where}: {what} {file} is no file")

    def load_tasks(self) -> None:
        """Generate or read the problems of all tasks; all ranks call it together.

        Raises:
            ConfigError: a task cannot be had, or the validation set asks what the held-out set asks.
        """
        from megatron_taopd.evaluation.tasks import load_tasks

        for name, measured in self.sets.items():
            if measured.tasks:
                self.tasks[name] = load_tasks(measured.tasks)
        asked = {problem.text for task in self.tasks[HELD_OUT] for problem in task.problems}
        for task in self.tasks[VALIDATION]:
            both = sum(problem.text in asked for problem in task.problems)
            if both:
                raise ConfigError(
                    f"suite {self.suite.path}: {both} of {len(task.problems)} problems of the validation task "
                    f"{task.name} are held-out problems, too; a learning rate must not be chosen on what is reported. "
                    "Give it another problem_seed or file"
                )

    def identity(self, run: Run) -> dict[str, Any]:
        """What a run's numbers depend on: settings, and contents of the data files and models.

        Raises:
            ModelError: a directory holds no model.
        """
        settings = {k: v for k, v in flat_values(self.config(run)).items() if k not in CHANGES_NOTHING}
        files = {key: self._fingerprint(settings[key]) for key in ("prompt_data", "rollout_data") if settings[key]}
        for name in self.sets_of(run):
            rollouts = self.sets[name].rollouts
            if rollouts is not None:
                files[name] = self._fingerprint(rollouts)
            for task in self.tasks[name]:
                files[f"{name} task {task.name}"] = _task_fingerprint(task)
        models = {what: self._model_fingerprint(path) for what, path in self._models_of(run).items()}
        return {"settings": settings, "files": files, "models": models}

    def _models_of(self, run: Run) -> dict[str, str]:
        """Directory of the student and of each teacher, by what messages call it."""
        models = self.config(run).models
        teachers = {f"teacher {name or ''}".strip(): path for name, path in models.named_teachers()}
        return {"student": models.student, **teachers}

    def _model_fingerprint(self, path: str) -> str:
        from megatron_taopd.diagnostics.fingerprints import model_fingerprint  # imports Megatron

        if path not in self._models:
            self._models[path] = model_fingerprint(path)
        return self._models[path]

    def _fingerprint(self, path: str) -> str:
        if path not in self._fingerprints:
            self._fingerprints[path] = fingerprint(path)
        return self._fingerprints[path]


def _task_fingerprint(task: Task) -> str:
    """Of its problems, and how they are put."""
    problems = [(problem.text, problem.gold, problem.choices) for problem in task.problems]
    text = repr((task.kind, sorted(task.settings.report(task.kind).items()), problems))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _filled(value: Any, names: Mapping[str, str]) -> Any:
    """A configuration, list or text with the placeholders of its texts filled in."""
    if isinstance(value, str):
        for name, text in names.items():
            value = value.replace(name, text)
        return value
    if isinstance(value, list):
        return [_filled(item, names) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _filled(getattr(value, f.name), names) for f in fields(value)})
    return value
