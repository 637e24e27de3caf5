"""The libraries of the report, which `taopd diagnose bank` and `gain` do without."""

from __future__ import annotations

import importlib
from typing import Any

from megatron_taopd.errors import ConfigError


def library(name: str) -> Any:
    """An imported module of the ``report`` extra.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f'taopd diagnose report needs {name.partition(".")[0]} ({error}); pip install -e ".[report]"'
        ) from error
