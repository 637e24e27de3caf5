"""What several rooms ask of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PIECE = 16 * 2**20


def sha256_of_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
