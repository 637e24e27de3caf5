"""JSON Lines with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_taopd.errors import DataError


def read_objects(path: str | Path, *, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``("file:line", object)`` for every line that is not blank.

    Args:
        what: what the file holds, for the messages ("prompts").

    Raises:
        DataError: the file is missing, empty or not UTF-8, or a line is not a JSON object.
    """
    path = Path(path)
    empty = True
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                empty = False
                yield f"{path}:{number}", parse_object(line, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"cannot read {what} from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); {what} are read from JSON Lines") from error
    if empty:
        raise DataError(f"{path} is empty: it must hold {what}, one JSON object a line")


def parse_object(line: str, where: str) -> dict[str, Any]:
    """The object on a line.

    Raises:
        DataError: the line is not one; the message begins with ``where``.
    """
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a line must be a JSON object, not {type(value).__name__}")
    return value


def check_teacher(line: dict[str, Any], where: str, names: Sequence[str]) -> None:
    """Check that a line's 'teacher' is one of several; where there is one only, it may be missing.

    Raises:
        DataError: it is missing or unknown.
    """
    known = ", ".join(names)
    if "teacher" not in line:
        if len(names) > 1:
            raise DataError(f"{where}: no 'teacher'; with several of --teacher a line names one of {known}")
    elif names and line["teacher"] not in names:
        raise DataError(f"{where}: 'teacher' is {line['teacher']!r}, which no --teacher is called; there are {known}")


def token_ids(value: Any, where: str, key: str, *, vocab_size: int | None = None) -> list[int]:
    """Check that ``value`` is a non-empty list of token ids.

    Raises:
        DataError: it is not, or an id is outside the vocabulary.
    """
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise DataError(f"{where}: '{key}' must be a list of token ids (integers)")
    if not value:
        raise DataError(f"{where}: '{key}' is empty; at least one token is needed")
    lowest, highest = min(value), max(value)
    if lowest < 0:
        raise DataError(f"{where}: '{key}' has the token id {lowest}; ids start at 0")
    if vocab_size is not None and highest >= vocab_size:
        raise DataError(
            f"{where}: '{key}' has the token id {highest}, outside the models' common vocabulary of "
            f"{vocab_size} ids; was the file made with another tokenizer?"
        )
    return value


def conversation(value: Any, where: str) -> list[dict[str, Any]]:
    """Check that ``value`` is a list of messages with a role.

    Raises:
        DataError: it is not.
    """
    good = isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value)
    if not good:
        raise DataError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    return value


def text(value: Any, where: str, key: str) -> str:
    """Check that ``value`` is a string.

    Raises:
        DataError: it is not.
    """
    if not isinstance(value, str):
        hint = "; a conversation belongs under 'messages'" if key == "prompt" and isinstance(value, list) else ""
        raise DataError(f"{where}: '{key}' must be a string, not {type(value).__name__}{hint}")
    return value
