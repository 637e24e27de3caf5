"""``SHA256SUMS`` of a checkpoint, in the form that ``sha256sum --check`` reads. Nothing here imports Megatron."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from megatron_taopd.errors import DamagedCheckpointError
from megatron_taopd.files import sha256_of_file

SUMS = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_sums(directory: Path, digests: Mapping[str, str]) -> None:
    """Write the sums of files, named relative to ``directory``."""
    with open(directory / SUMS, "w", encoding="utf-8") as stream:
        stream.writelines(f"{digests[name]}  {name}\n" for name in sorted(digests))
        stream.flush()
        os.fsync(stream.fileno())


def read_sums(directory: Path) -> dict[str, str]:
    """Sums by file name; empty where there are none, as in checkpoints of other programs.

    Raises:
        DamagedCheckpointError: the file is not what it should be.
    """
    path = directory / SUMS
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise DamagedCheckpointError(f"checkpoint {directory} is damaged: {SUMS}: {error}") from error
    matches = [_LINE.fullmatch(line) for line in text.splitlines()]
    if not matches or not text.endswith("\n") or None in matches:
        raise DamagedCheckpointError(f"checkpoint {directory} is damaged: {SUMS} is torn")
    return {match[2]: match[1] for match in matches if match is not None}


def find_damage(directory: Path, sums: Mapping[str, str], *, share: int, shares: int) -> str | None:
    """Read every ``shares``-th file, from the ``share``-th on; what is wrong with one of them, or None."""
    for name in sorted(sums)[share::shares]:
        try:
            found = sha256_of_file(directory / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != sums[name]:
            return f"{name} has other bytes than were written (SHA-256 {found[:12]}… instead of {sums[name][:12]}…)"
    return None
