"""Hashes of JSON objects."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def hash_object(value: Any) -> str:
    """SHA-256 of a JSON object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
