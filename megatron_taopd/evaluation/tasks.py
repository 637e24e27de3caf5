"""Tasks: what to evaluate on, from a short form or a YAML file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_taopd.errors import ConfigError
from megatron_taopd.evaluation.options import (
    KINDS,
    REASONING_GYM,
    Settings,
    TaskOptions,
    refuse_flags_in_vain,
    resolve_options,
)
from megatron_taopd.evaluation.problems import Problem, generate_problems, logger, read_problems
from megatron_taopd.evaluation.verdicts import check_golds, scorer_of
from megatron_taopd.platform.together import from_rank_zero

_NAMED = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)=(?P<spec>.+)")
_FORMS = "reasoning_gym:GENERATOR, math:FILE.jsonl, choice:FILE.jsonl, exact:FILE.jsonl or a YAML file"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Problems of one kind, and how they are put."""

    name: str
    kind: str
    """One of :data:`KINDS`, or a scorer of one's own as ``pkg.module:function``."""
    source: str
    """Generator of reasoning-gym, or file."""
    settings: Settings
    problems: list[Problem]


def load_tasks(specs: Sequence[str], flags: TaskOptions | None = None, *, recorded: bool = False) -> list[Task]:
    """Generate or read the problems of all tasks. All ranks call it; rank 0 does it for them.

    Args:
        specs: ``[NAME=]KIND:SOURCE`` or ``[NAME=]FILE.yaml``; see ``taopd eval --help``.
        flags: options for all tasks, before those of a task's file.
        recorded: the responses are there already, so options of the generation are refused.

    Raises:
        ConfigError: a task cannot be had, or an option has no effect.
        DataError: a file of problems is of no use.
    """
    flags = TaskOptions() if flags is None else flags

    def load() -> list[Task]:
        described = [_describe(spec) for spec in specs]
        names = [name for name, *_ in described]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(
                    f"{names.count(name)} tasks are called {name!r}; give them names: --task NAME=KIND:SOURCE"
                )
        refuse_flags_in_vain(flags, [kind for _, kind, _, _ in described], recorded=recorded)
        return [
            _load(name, kind, source, resolve_options(kind, flags, of_file, where=f"task {name}"))
            for name, kind, source, of_file in described
        ]

    return from_rank_zero(load)


def _load(name: str, kind: str, source: str, settings: Settings) -> Task:
    if kind == REASONING_GYM:
        problems = generate_problems(source, settings)
    else:
        problems = read_problems(source, kind, settings)
    check_golds(kind, problems, source)
    distinct = len({problem.text for problem in problems})
    if distinct < len(problems):
        logger.warning("task %s: only %d of %d problems are different", name, distinct, len(problems))
    task = Task(name=name, kind=kind, source=source, settings=settings, problems=problems)
    scorer_of(task)  # refuses what cannot be had
    return task


def _describe(spec: str) -> tuple[str, str, str, TaskOptions]:
    """Name, kind, source and the options of its file."""
    match = _NAMED.fullmatch(spec)
    name = None
    if match is not None and not Path(spec).exists():
        name, spec = match["name"], match["spec"]
    if spec.endswith((".yaml", ".yml")):
        of_file = _read_yaml(Path(spec))
        return (name or of_file[0], *of_file[1:])
    kind, colon, source = spec.partition(":")
    if not colon or not source or kind not in KINDS:
        raise ConfigError(f"--task {spec!r} is none of {_FORMS}")
    return name or (source if kind == REASONING_GYM else Path(source).stem), kind, source, TaskOptions()


def _read_yaml(path: Path) -> tuple[str, str, str, TaskOptions]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"task file {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"task file {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"task file {path} must be a mapping with kind, generator or data, and options")
    values: dict[str, Any] = {str(key).replace("-", "_"): value for key, value in content.items()}
    name, kind = str(values.pop("name", path.stem)), str(values.pop("kind", ""))
    if kind not in KINDS and ":" not in kind:
        raise ConfigError(
            f"task file {path}: kind {kind!r} is none of {', '.join(KINDS)}, nor your own scorer (pkg.module:function)"
        )
    key = "generator" if kind == REASONING_GYM else "data"
    if key not in values:
        raise ConfigError(f"task file {path}: a task of kind {kind} needs {key!r}")
    source = str(values.pop(key))
    types = {f.name: str(f.type) for f in dataclasses.fields(TaskOptions)}
    for option, value in list(values.items()):
        if option not in types:
            raise ConfigError(f"task file {path}: unknown key {option!r}; known: name, kind, {key}, {', '.join(types)}")
        values[option] = _typed(path, option, types[option], value)
    return name, kind, source, TaskOptions(**values)


def _typed(path: Path, option: str, wanted: str, value: Any) -> Any:
    """A value of the YAML file as the flag of this name has it."""
    if value is None:
        return [] if wanted == "List" else None
    if wanted == "List":
        value = [value] if isinstance(value, str) else value
        good = isinstance(value, list) and all(isinstance(one, str) for one in value)
    elif isinstance(value, dict):
        return json.dumps(value)
    elif option == "prompt_style":
        good = value in ("chat", "raw")
    elif "float" in wanted:
        good = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        good = type(value) is {"int | None": int, "bool": bool, "str | None": str}[wanted]
    if not good:
        raise ConfigError(f"task file {path}: {option} cannot be {value!r}")
    return value
