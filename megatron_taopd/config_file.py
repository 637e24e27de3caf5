"""``--config FILE.yaml``: a flat mapping of flags, layered under those of the command line."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_taopd.errors import ConfigError


def flag_fields(config_type: type) -> dict[str, Any]:
    """Every flag of a configuration class, nested classes flattened: field name to type."""
    hints = typing.get_type_hints(config_type)
    flags: dict[str, Any] = {}
    for field in dataclasses.fields(config_type):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            flags.update(flag_fields(typing.cast(type, kind)))
        else:
            flags[field.name] = kind
    return flags


def flat_values(config: Any) -> dict[str, Any]:
    """The resolved values of a configuration, nested classes flattened, as ``--config`` reads them back."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values.update(flat_values(value))
        else:
            values[field.name] = value
    return values


def read_config_file(path: str | Path, config_type: type, *, instead: Sequence[str] = ()) -> list[str]:
    """Turn a YAML file into command-line words.

    Keys are flag names with hyphens or underscores; ``null`` leaves a flag at its default.

    Args:
        instead: words of the command line; flags that are among them are left out.

    Raises:
        ConfigError: the file is missing, not a flat mapping, or has a key that is no flag (nearest names are shown).
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must be a mapping of flag names to values, not {type(content).__name__}")
    given = {word.split("=")[0].removeprefix("--").replace("-", "_") for word in instead if word.startswith("--")}
    named = flag_names(content, config_type, where=f"--config {path}")
    return [
        word
        for name, value in named.items()
        if name not in given
        for word in as_words(name, value, where=f"--config {path}")
    ]


def flag_names(content: dict[Any, Any], config_type: type, *, where: str) -> dict[str, Any]:
    """The mapping with its keys as field names.

    Raises:
        ConfigError: a key is no flag of ``config_type``; the message begins with ``where`` and has the nearest names.
    """
    flags = flag_fields(config_type)
    named: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in flags:
            near = difflib.get_close_matches(name, flags, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else f"; known keys: {', '.join(sorted(flags))}"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
        named[name] = value
    return named


def as_words(name: str, value: Any, *, where: str) -> list[str]:
    """The command-line words of a YAML value; none for null.

    Raises:
        ConfigError: the value is of a kind that no flag has.
    """
    flag = "--" + name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, dict):
        return [f"{flag}={json.dumps(value)}"]
    if isinstance(value, list):
        return [word for item in value for word in (flag, str(item))]
    if isinstance(value, str | int | float):
        return [f"{flag}={value}"]
    raise ConfigError(f"{where}: {name} has a value of type {type(value).__name__}; use a plain value")
