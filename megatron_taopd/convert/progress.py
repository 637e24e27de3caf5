"""How far a conversion is, as log lines."""

from __future__ import annotations

import logging
import time

logger = logging.getLogger(__name__)


class Progress:
    """Logs bytes done, speed and the time left, every ten seconds.

    Args:
        what: begins each line.
        total: bytes to do.
    """

    def __init__(self, what: str, total: int, *, interval: float = 10.0) -> None:
        self._what, self._total, self._interval = what, total, interval
        self._done = self._skipped = 0
        self._started = self._shown = time.monotonic()

    def add(self, num_bytes: int, *, skipped: bool = False) -> None:
        """More bytes are done, or were found done."""
        self._done += num_bytes
        self._skipped += num_bytes if skipped else 0
        now = time.monotonic()
        if now - self._shown >= self._interval:
            self._shown = now
            rate = (self._done - self._skipped) / (now - self._started)
            left = f", about {(self._total - self._done) / rate:.0f} s left" if rate else ""
            logger.info("%s: %s, %.0f MB/s%s", self._what, self._share(), rate / 1e6, left)

    def finish(self) -> None:
        """The last line."""
        seconds = time.monotonic() - self._started
        again = f", of which {self._skipped / 1e9:.2f} GB had been done before" if self._skipped else ""
        logger.info("%s: %s in %.1f s%s", self._what, self._share(), seconds, again)

    def _share(self) -> str:
        return f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB ({self._done / max(self._total, 1):.0%})"
