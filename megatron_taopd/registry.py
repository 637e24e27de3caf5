"""Look a plug-in up by name: a dictionary of ours, or any importable function."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from megatron_taopd.errors import ConfigError


def resolve(kind: str, name: str, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function called ``name`` in ``known``, or the one at ``pkg.module:function``.

    Args:
        kind: what is looked up, for the message ("selector", "loss").

    Raises:
        ConfigError: there is no such name, or it cannot be imported.
    """
    if name in known:
        return known[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"unknown {kind} {name!r}{hint} (available: {', '.join(known)}, or your own as pkg.module:function)"
        )
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{kind} {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"{kind} {name!r} is a {type(found).__name__}, not a function")
    return found
