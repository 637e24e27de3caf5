"""A run's configuration as a table: what was set otherwise than by default, and the rest."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from megatron_taopd.config import TrainConfig


@dataclass(kw_only=True)
class Setting:
    """A flag and its value."""

    flag: str
    value: str
    changed: bool
    """Whether the value differs from the default."""


@dataclass(kw_only=True)
class SettingGroup:
    """Flags of one room."""

    title: str
    settings: list[Setting]


def setting_groups(config: dict[str, Any]) -> list[SettingGroup]:
    """The configuration in the order of its classes. Keys that this version does not know come last."""
    groups: dict[str, list[Setting]] = {}
    known = set()
    for room, name, default in _fields(TrainConfig, "run"):
        if name in config:
            known.add(name)
            groups.setdefault(room, []).append(_setting(name, config[name], default))
    others = [_setting(name, value, dataclasses.MISSING) for name, value in config.items() if name not in known]
    if others:
        groups["of another version"] = others
    return [SettingGroup(title=title.replace("_", " "), settings=settings) for title, settings in groups.items()]


def _setting(name: str, value: Any, default: Any) -> Setting:
    return Setting(flag="--" + name.replace("_", "-"), value=_text(value), changed=value != default)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def _fields(kind: type, room: str) -> list[tuple[str, str, Any]]:
    """(room, flag, default) of a configuration class and those nested in it; MISSING where a flag must be given."""
    hints = typing.get_type_hints(kind)
    found = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            found += _fields(typing.cast(type, hints[field.name]), field.name)
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found.append((room, field.name, default))
    return found
