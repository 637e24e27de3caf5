"""Who makes a run: an exclusive file with a heartbeat, so that any number of processes share a suite's directory.

The holder is who made the highest-numbered file ``claim.N`` of a run's directory. A dead claim N is taken over by
making ``claim.N+1`` exclusively, which only one process can do. No clock is compared with another machine's: the age of
a heartbeat is the difference of two times that the file server wrote.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from pathlib import Path
from typing import Any

import psutil

HEARTBEAT_SECONDS = 15.0
DEAD_AFTER_SECONDS = 180.0


class Claim:
    """A held claim; its heartbeat is a thread of this process."""

    def __init__(self, path: Path, token: str) -> None:
        self.path = path
        self.token = token
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat of {path}", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:
                return  # the directory was deleted, or its file server is gone; others may take the run over

    def is_ours(self) -> bool:
        """Whether nobody has taken it over, say while this process was suspended."""
        latest = _latest(self.path.parent)
        return latest is not None and latest[1] == self.path and (_read(self.path) or {}).get("token") == self.token

    def release(self) -> None:
        """Give it back: the run is finished, or is to be continued by whoever comes next."""
        self._stop.set()
        self._thread.join()
        if self.is_ours():
            for path in self.path.parent.glob("claim.*"):
                path.unlink(missing_ok=True)


def take(directory: Path) -> Claim | None:
    """Claim a run's directory; None where a living process has it."""
    directory.mkdir(parents=True, exist_ok=True)
    latest = _latest(directory)
    if latest is not None and is_alive(latest[1]):
        return None
    path = directory / f"claim.{1 if latest is None else latest[0] + 1}"
    token = uuid.uuid4().hex
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump({"token": token, "pid": os.getpid(), "created": _created(os.getpid()), "place": _place()}, file)
    except FileExistsError:
        return None
    return Claim(path, token)


def is_claimed(directory: Path) -> bool:
    """Whether a living process is at it."""
    latest = _latest(directory)
    return latest is not None and is_alive(latest[1])


def is_alive(path: Path) -> bool:
    """Whether the process that wrote a claim still runs: by its number here, by its heartbeat elsewhere."""
    owner = _read(path)
    if owner is not None and owner["place"] == _place():
        created = _created(owner["pid"])
        return (
            created is not None and abs(created - owner["created"]) < 10.0
        )  # the boot time it is reckoned from drifts
    probe = path.parent / f"now.{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime < DEAD_AFTER_SECONDS
    except FileNotFoundError:
        return False  # released meanwhile
    finally:
        probe.unlink(missing_ok=True)


def _latest(directory: Path) -> tuple[int, Path] | None:
    numbers = [int(path.suffix[1:]) for path in directory.glob("claim.*") if path.suffix[1:].isdigit()]
    return (max(numbers), directory / f"claim.{max(numbers)}") if numbers else None


def _read(path: Path) -> dict[str, Any] | None:
    """What a claim says; None where it is gone or just being written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _created(pid: int) -> float | None:
    """When a process started, None where none runs: numbers are used again."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _place() -> str:
    """Where process numbers mean the same: this boot of this machine, this container."""
    parts = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(), _pid_namespace):
        try:
            parts.append(read())
        except OSError:
            parts.append("?")
    return " ".join(parts)


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")
