"""Disturb a training run in ways other than SIGKILL, start it again, and take the time of both.

    python tools/time_faults.py --out DIR [--only NAME …]

The run of ``kill_at_any_moment.py``: real processes under ``python -m megatron_taopd.torchrun``, a checkpoint every two
of 24 steps. "All ended after" counts from the signal or, with a time limit, from the last step. Numbers and weights are
compared with an undisturbed run's, bitwise. Prints a Markdown table; exits 1 if a run ends otherwise, or with another
exit status than docs/reliability.md promises.
"""

from __future__ import annotations

import argparse
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from kill_at_any_moment import (
    family,
    make_inputs,
    numbers,
    rank_of,
    start,
    steps_done,
    wait_for_all,
    weights,
)

from megatron_taopd.checkpoint.layout import find_iteration, read_latest_iteration
from megatron_taopd.exit_status import HUNG, RUN_AGAIN

DISTURBED_AFTER = 11  # steps; the newest checkpoint is that of the tenth


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How a run is disturbed."""

    status: int
    """Of the disturbed run."""
    disturb: Callable[[subprocess.Popen], None] | None
    """None: its time is up."""
    flags: tuple[str, ...] = ()
    spoil: Callable[[Path], None] = lambda checkpoints: None
    """Between the end of the run and the next start."""


def send(number: signal.Signals) -> Callable[[subprocess.Popen], None]:
    """To torchrun, as a batch system does."""
    return lambda process: process.send_signal(number)


def stop_rank_1(process: subprocess.Popen) -> None:
    """It stays there and does nothing more; a process that is stopped ends with nothing but SIGKILL."""
    for child in psutil.Process(process.pid).children():
        if rank_of(child) == "1":
            child.suspend()


def flip_a_bit(checkpoints: Path) -> None:
    """In the middle of a rank's tensors in the newest checkpoint."""
    newest = read_latest_iteration(checkpoints)
    assert newest is not None
    file = find_iteration(checkpoints, newest)[0] / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FAULTS = {
    "SIGTERM": Fault(status=RUN_AGAIN, disturb=send(signal.SIGTERM)),
    "SIGUSR1": Fault(status=RUN_AGAIN, disturb=send(signal.SIGUSR1)),
    "time limit": Fault(status=RUN_AGAIN, disturb=None),
    "corrupt checkpoint": Fault(status=RUN_AGAIN, disturb=send(signal.SIGTERM), spoil=flip_a_bit),
    "hung rank": Fault(status=HUNG, disturb=stop_rank_1, flags=("--distributed-timeout-minutes=0.5",)),
}


def run(root: Path, straight: Path, out: Path, fault: Fault, *, limit: float) -> tuple[str, bool]:
    """The cells of the table, and whether all is as promised.

    Args:
        limit: seconds after which a run is somewhere in its middle.
    """
    out.mkdir()
    flags = (f"--exit-duration-in-mins={limit / 60}",) if fault.disturb is None else fault.flags
    process = start(root, out, out / "log.txt", *flags, in_background=False)
    done, disturbed, known = 0, time.monotonic(), family(process)
    while process.poll() is None and (fault.disturb is None or done < DISTURBED_AFTER):
        if steps_done(out) > done:
            done, disturbed, known = steps_done(out), time.monotonic(), family(process)
        time.sleep(0.002)
    if fault.disturb is not None:
        assert process.poll() is None, (out / "log.txt").read_text()
        disturbed = time.monotonic()
        fault.disturb(process)
    status = process.wait()
    wait_for_all(out, known)
    ended = time.monotonic() - disturbed
    done, saved = steps_done(out), read_latest_iteration(out / "checkpoints") or 0
    fault.spoil(out / "checkpoints")

    process = start(root, out, out / "log.txt", in_background=False)
    began, recovered = time.monotonic(), math.nan
    while process.poll() is None:
        if math.isnan(recovered) and steps_done(out) > done:
            recovered = time.monotonic() - began
        time.sleep(0.01)
    again = done - int(re.findall(r"resumed from iteration (\d+)", (out / "log.txt").read_text())[-1])
    same = process.wait() == 0 and numbers(out) == numbers(straight) and weights(out) == weights(straight)
    cells = f"{done} | {saved} | {ended:.1f} s | {status} | {again} | {recovered:.1f} s | {'yes' if same else '**no**'}"
    return cells, same and status == fault.status


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    options = parser.parse_args()
    root: Path = options.out
    root.mkdir(parents=True)
    make_inputs(root)
    straight = root / "straight"
    straight.mkdir()
    began, first_step, half_way = time.monotonic(), math.nan, math.nan
    process = start(root, straight, straight / "log.txt", in_background=False)
    while process.poll() is None:
        done, now = steps_done(straight), time.monotonic() - began
        if done and math.isnan(first_step):
            first_step = now
        if done >= DISTURBED_AFTER and math.isnan(half_way):
            half_way = now
        time.sleep(0.02)
    assert process.returncode == 0, (straight / "log.txt").read_text()
    print(f"undisturbed: first step after {first_step:.1f} s, all after {time.monotonic() - began:.1f} s\n")
    print(
        "| fault | steps done | newest checkpoint | all ended after | status | steps made again | next new step after "
        "| same numbers and weights |\n|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    kept = True
    for name in options.only:
        cells, as_promised = run(
            root, straight, root / name.replace(" ", "_"), FAULTS[name], limit=half_way - first_step
        )
        print(f"| {name} | {cells} |", flush=True)
        kept = kept and as_promised
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
