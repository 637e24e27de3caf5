"""``torchrun`` that hands signals on to the ranks and ends with their exit status.

``python -m megatron_taopd.torchrun`` takes torchrun's words. torchrun itself answers SIGTERM by ending its ranks after
30 seconds and dies of SIGUSR1, so that a long step or checkpoint would be cut off, and its exit status is 1 whatever
the ranks' was. Here both signals go to the ranks, which stop at the end of a step; the status is that of
:mod:`megatron_taopd.exit_status`, or 128 + n for a rank that signal n ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import Any

import psutil

from megatron_taopd.exit_status import RUN_AGAIN

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def main(words: Sequence[str] | None = None) -> int:
    """Run ranks on this node until they end; returns the exit status."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import api as elastic
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments: Any = run.parse_args(words)
    if arguments.max_restarts:
        # torchrun shares one store with all generations of ranks, and the next one reads the addresses of the dead
        # there (pytorch/pytorch#135712): let rank 0 of each generation have its own.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    api: Any = elastic
    handler = _HandOn(api._terminate_process_handler)
    # torchrun installs this one for SIGTERM and others, by this name, each time that it starts ranks.
    api._terminate_process_handler = handler
    for number in STOP_SIGNALS:
        signal.signal(number, handler)
    try:
        run.run(arguments)
    except ChildFailedError as error:
        failures = sorted(error.failures.items(), key=lambda item: (item[1].timestamp, item[1].exitcode < 0))
        status = exit_status((failure.exitcode for _, failure in failures), asked_to_stop=handler.asked_to_stop)
        if status == RUN_AGAIN:
            print(f"torchrun: the ranks stopped as asked; run again (exit status {status})", file=sys.stderr)
        else:
            rank, first = failures[0]
            ended = f"exit code {first.exitcode}" if first.exitcode >= 0 else f"signal {-first.exitcode}"
            print(f"torchrun: rank {rank} ended with {ended}, and the others with it", file=sys.stderr)
        return status
    except elastic.SignalException as error:
        return 128 + error.sigval
    return 0


def exit_status(exit_codes: Iterable[int], *, asked_to_stop: bool) -> int:
    """The status of ranks that ended with these codes, the first to fail at the head; negative ones are signals.

    A rank that a stop signal ended before it could handle it has done nothing that could be lost.
    """
    codes = list(exit_codes)
    stopped = {RUN_AGAIN, *(-number for number in STOP_SIGNALS)}
    if stopped.issuperset(codes) and (asked_to_stop or RUN_AGAIN in codes):
        return RUN_AGAIN
    return codes[0] if codes[0] > 0 else 128 - codes[0]


class _HandOn:
    """Signal handler: stop signals go to the ranks, if there are any yet."""

    def __init__(self, terminate: Any) -> None:
        self.terminate = terminate
        self.asked_to_stop = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        ranks = psutil.Process().children()
        if number not in STOP_SIGNALS or not (ranks or self.asked_to_stop):
            self.terminate(number, frame)
        self.asked_to_stop = True
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
