"""What all benchmarks share: clocks, peak memory, who the peers are, and the result files.

Time. All contenders take part in one process: each is warmed up, then they run in rounds, one call each, in an order
that shifts with the round; so a disturbance of the machine meets all of them. A ratio is one of minima within a run.

Memory. Each contender has a fresh process. After a warm-up (compilers, thread pools) freed memory goes back to the
system, and one more run is measured twice over: the highest resident set (VmHWM, reset for that run) above the resident
set before it, which includes the workspaces of BLAS; and the most bytes that tensors held at once, from torch's
profiler, which no allocator blurs.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "megatron-core", "transformers", "trl", "liger-kernel", "triton", "numpy")
MIB = 2**20

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it says that GKD's place may change
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a checkout that is not installed


@dataclass
class Timing:
    """Seconds of every round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Of all threads of the process together."""

    def of(self, clock: str) -> list[float]:
        return self.wall if clock == "wall" else self.cpu

    def best(self, clock: str) -> float:
        return min(self.of(clock))

    def median(self, clock: str) -> float:
        return statistics.median(self.of(clock))


@dataclass
class Memory:
    """Highest bytes above what was there before the run."""

    resident: int
    tensors: int


@dataclass
class Table:
    """One table of results. A column of ``rows`` that ``columns`` does not name stays in the JSON alone."""

    name: str
    title: str
    columns: dict[str, str]
    """Key in a row, and its heading."""
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    command: str = ""
    environment: dict[str, Any] = field(default_factory=dict)


def time_all(
    contenders: Mapping[str, Callable[[], Any]], *, rounds: int, warmups: int = 1, budget: float | None = None
) -> dict[str, Timing]:
    """Run the contenders in turns.

    Args:
        warmups: calls of each before the rounds.
        budget: seconds after which no further round starts (the first one always runs).
    """
    for run in contenders.values():
        for _ in range(warmups):
            run()
    result = {name: Timing() for name in contenders}
    names = list(contenders)
    started = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            if number and budget is not None and time.perf_counter() - started > budget:
                break
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                wall, cpu = time.perf_counter(), time.process_time()
                contenders[name]()
                result[name].cpu.append(time.process_time() - cpu)
                result[name].wall.append(time.perf_counter() - wall)
    finally:
        gc.enable()
    return result


def in_fresh_process(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)`` in a new interpreter; ``fn`` is at the top level of a module."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_answer, args=(theirs, fn, args))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        process.join()
        raise SystemExit(
            f"{fn.__name__}{args} ended with exit code {process.exitcode} (-9: out of memory; -11: it crashed)"
        ) from None
    process.join()
    return answer


def _send_answer(pipe: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    pipe.send(fn(*args))


def peak_memory(run: Callable[[], Any], *, warmups: int = 1) -> Memory:
    """Peak of one call above the state before it; call it in a fresh process that has made the inputs."""
    for _ in range(warmups):
        run()
    gc.collect()
    _return_freed_memory()
    before = resident_bytes()
    reset_peak()
    run()
    resident = resident_bytes("VmHWM") - before
    return Memory(resident=max(resident, 0), tensors=_peak_of_tensors(run))


def _peak_of_tensors(run: Callable[[], Any]) -> int:
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    kineto = profiler.profiler.kineto_results
    stack, highest = list(kineto.experimental_event_tree()), 0
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag == _EventType.Allocation:
            highest = max(highest, event.extra_fields.total_allocated)
    return highest


def resident_bytes(name: str = "VmRSS") -> int:
    """VmRSS now, or VmHWM: the highest since :func:`reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}: peak memory is measured on Linux only")


def reset_peak() -> None:
    """Start VmHWM of this process anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _return_freed_memory() -> None:
    """What the C library keeps of freed memory would count as there before, and hide the peak."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def missing_peer(*packages: str) -> str | None:
    """Why a peer cannot take part, or None."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"not installed: {', '.join(absent)} (pip install --no-deps -r benchmarks/requirements.txt)"


def environment(threads: int, processes: int = 1) -> dict[str, Any]:
    """What a figure depends on beside the code."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "processes": processes,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _commit() -> str | None:
    """Commit of the checkout, marked where files differ from it; None outside a checkout."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def arguments(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch, for every contender")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each contender")
    parser.add_argument("--budget", type=float, default=None, help="seconds after which no further round starts")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu suits a busy machine, with --threads 1"
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the tables")
    parser.set_defaults(**defaults)
    return parser


def start(args: argparse.Namespace) -> None:
    """Threads of this process and of those it starts."""
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)


def finish(tables: Sequence[Table], args: argparse.Namespace, *, processes: int = 1) -> None:
    """Print the tables, and write them as JSON where ``--out`` says."""
    from report import markdown

    command = shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    for table in tables:
        table.command = command
        table.environment = environment(args.threads, processes)
    data = [asdict(table) for table in tables]
    print(markdown(data))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
