"""What this process is at, for a watchdog to read: work says where it is, and that it goes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Of the process as a whole."""

    iteration: int = 0
    phase: str = "start"
    beats: int = 0
    """Grows with every piece of work."""


current = Progress()


def enter(phase: str, iteration: int | None = None) -> None:
    """A phase of the run begins."""
    current.phase = phase
    if iteration is not None:
        current.iteration = iteration
    beat()


def beat() -> None:
    """A piece of work is done: a micro-batch, a token of the rollout, a tensor."""
    current.beats += 1
