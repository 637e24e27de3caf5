"""An output directory in the making: written aside, taken up again after an interruption, renamed when whole.

Beside the output ``NAME`` there is ``.NAME.partial/`` while it is being made, with ``out/`` (what will be ``NAME``) and
``manifest.jsonl``: first what is being done, then a line for each finished file with its size and SHA-256. A file that
the manifest does not know, or whose bytes are others, is written anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_taopd.errors import ConfigError
from megatron_taopd.files import sha256_of_file

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.jsonl"
_BLOCK = 1 << 24


class HashingStream:
    """A binary file that is only appended to, and the digest of what went into it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: Any) -> int:
        """Append."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._size += len(view)
        for start in range(0, len(view), _BLOCK):
            self._stream.write(view[start : start + _BLOCK])
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """To the operating system."""
        self._stream.flush()

    def hexdigest(self) -> str:
        """SHA-256 of what was written so far."""
        return self._digest.hexdigest()


class Workspace:
    """The directory aside, its manifest, and the renaming at the end. Holds a lock until the process ends.

    Args:
        out_dir: what is to be made.
        job: source and options; work begun for another job is thrown away.
        overwrite: replace an existing ``out_dir``.
        replaceable: why an existing directory may not be replaced even so, or None.

    Raises:
        ConfigError: ``out_dir`` is there and not to be replaced, or another process is making it.
    """

    def __init__(
        self,
        out_dir: str | Path,
        *,
        job: dict[str, Any],
        overwrite: bool,
        replaceable: Callable[[Path], str | None],
    ) -> None:
        self.out_dir = Path(out_dir).absolute()
        self._partial = self.out_dir.with_name(f".{self.out_dir.name}.partial")
        self.content = self._partial / "out"
        self._job = json.loads(json.dumps(job))
        self._finished: dict[str, dict[str, Any]] = {}
        self.already_published = False
        self._refuse_if_occupied(overwrite, replaceable)
        self._partial.mkdir(parents=True, exist_ok=True)
        self._lock()
        self._take_up()

    def _refuse_if_occupied(self, overwrite: bool, replaceable: Callable[[Path], str | None]) -> None:
        if not self.out_dir.exists() or (self.out_dir.is_dir() and not any(self.out_dir.iterdir())):
            return
        if self._was_published():
            return
        if not overwrite:
            raise ConfigError(f"{self.out_dir} exists; give another --output, or --overwrite to replace it when done")
        if (reason := replaceable(self.out_dir)) is not None:
            raise ConfigError(f"{self.out_dir} is not replaced by --overwrite: {reason}")

    def _was_published(self) -> bool:
        """An earlier process renamed the output into place and died before it could clean up."""
        job, _ = self._read_manifest()
        return job == self._job and not self.content.exists()

    def _lock(self) -> None:
        self._lock_file = open(self._partial / "lock", "w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is making {self.out_dir}; wait for it or end it") from None

    def _take_up(self) -> None:
        if self.out_dir.exists() and self._was_published():
            self.already_published = True
            return
        job, finished = self._read_manifest()
        if job == self._job and self.content.is_dir():
            self._finished = finished
            logger.info("taking up the work of an earlier run in %s", self._partial)
            return
        if self.content.exists():
            logger.info("%s was begun with other sources or options; it is made anew", self._partial)
            shutil.rmtree(self.content)
        # The manifest comes last: with it and without content the output would count as published.
        (self._partial / _MANIFEST).unlink(missing_ok=True)
        self.content.mkdir()
        self._append({"job": self._job})

    def _read_manifest(self) -> tuple[Any, dict[str, dict[str, Any]]]:
        lines: list[dict[str, Any]] = []
        try:
            text = (self._partial / _MANIFEST).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None, {}
        for line in text.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # the last line, torn
                break
        if not lines or "job" not in lines[0]:
            return None, {}
        return lines[0]["job"], {line["file"]: line for line in lines[1:] if "file" in line}

    def _append(self, line: dict[str, Any]) -> None:
        path = self._partial / _MANIFEST
        torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(("\n" if torn else "") + json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def finished(self, name: str) -> Any | None:
        """Notes on a file of ``content`` that an earlier run finished, if its bytes are still those; else None."""
        record, path = self._finished.get(name), self.content / name
        if record is None or not path.is_file() or path.stat().st_size != record["size"]:
            return None
        if sha256_of_file(path) != record["sha256"]:
            logger.info("%s was changed since it was written; it is made anew", path)
            return None
        return record["notes"]

    @contextmanager
    def write(self, name: str, notes: Any) -> Iterator[BinaryIO]:
        """A file of ``content`` to be written; it counts as finished when the block is left without an error.

        Args:
            notes: kept in the manifest, as it is when the block is left (lists and dicts may be filled inside).
        """
        path = self.content / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb", buffering=0) as raw:
            stream = HashingStream(cast(BinaryIO, raw))
            yield cast(BinaryIO, stream)
            os.fsync(raw.fileno())
        self._append({"file": name, "size": stream.tell(), "sha256": stream.hexdigest(), "notes": notes})

    def publish(self) -> None:
        """Put ``content`` in place of ``out_dir`` and remove what is left."""
        if not self.already_published:
            replaced = self._partial / "replaced"
            if self.out_dir.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                os.rename(self.out_dir, replaced)
            os.rename(self.content, self.out_dir)
        # The manifest goes last, so that a run that dies in between can tell that it is done.
        shutil.rmtree(self._partial / "replaced", ignore_errors=True)
        (self._partial / _MANIFEST).unlink()
        self._lock_file.close()
        shutil.rmtree(self._partial)
