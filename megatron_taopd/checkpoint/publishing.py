"""Checkpoints appear by a rename and go by one, so that a directory called ``iter_…`` is always whole.

One rank calls these. Whatever moment the machine dies at, :func:`tidy` finds what to put back or take away.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from pathlib import Path

from megatron_taopd.checkpoint import layout

logger = logging.getLogger(__name__)


def make_aside(directory: Path, iteration: int) -> Path:
    """A new directory to write an iteration into; leftovers of earlier attempts are removed.

    Its name is of this attempt alone: a writer that outlived a killed run must not meet the next one.
    """
    tidy(directory)
    aside = directory / f".{layout.iteration_name(iteration)}.partial-{secrets.token_hex(4)}"
    aside.mkdir(parents=True)
    return aside


def publish(aside: Path, directory: Path, iteration: int) -> Path:
    """Give a finished checkpoint its name and make it the newest; an older one of that name is removed."""
    final = directory / layout.iteration_name(iteration)
    replaced = directory / f".{final.name}.replaced"
    _sync_directory(aside)
    if final.exists():
        os.rename(final, replaced)
    os.rename(aside, final)
    _sync_directory(directory)
    layout.write_latest_iteration(directory, iteration)
    _sync_directory(directory)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def tidy(directory: Path) -> None:
    """Remove what interrupted saves left; put back a checkpoint that was being replaced."""
    for replaced in directory.glob(".iter_*.replaced"):
        final = directory / replaced.name.removeprefix(".").removesuffix(".replaced")
        if final.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, final)
    for pattern in (".iter_*.partial*", ".iter_*.deleted"):
        for leftover in directory.glob(pattern):
            shutil.rmtree(leftover)


def keep_last(directory: Path, count: int, newest: int) -> None:
    """Delete all but the ``count`` newest checkpoints up to iteration ``newest``, and damaged ones before those."""
    past = [number for number in layout.iterations(directory) if number <= newest]
    doomed = {directory / layout.iteration_name(number) for number in past[count:]}
    oldest_kept = past[:count][-1]
    doomed.update(path for number, path in layout.damaged(directory) if number < oldest_kept)
    for path in sorted(doomed):
        gone = directory / f".{path.name}.deleted"
        try:
            os.rename(path, gone)
            shutil.rmtree(gone)
        except OSError as error:
            logger.warning("cannot delete the old checkpoint %s: %s", path, error)


def set_damaged_aside(path: Path, fallback: int) -> None:
    """Rename a damaged checkpoint to ``iter_….damaged`` and let the tracker name the one that is used instead."""
    damaged = path.with_name(f"{path.name}{layout.DAMAGED_SUFFIX}")
    if damaged.exists():
        shutil.rmtree(damaged)
    os.rename(path, damaged)
    layout.write_latest_iteration(path.parent, fallback)


def why_not_writable(directory: Path) -> str | None:
    """Try to write a file, before any work is done; the system's error, or None."""
    probe = directory / f".probe-{secrets.token_hex(4)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        return str(error)
    return None


def about_last_good(directory: Path) -> str:
    """What a failed save leaves: the newest checkpoint and the free space."""
    numbers = layout.iterations(directory)
    last = f"{layout.iteration_name(numbers[0])} is still the newest" if numbers else "none was written before"
    try:
        free = f"{shutil.disk_usage(directory).free / 2**30:.2f} GiB free there"
    except OSError as error:
        free = str(error)
    return f"{last}; {free}"


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
