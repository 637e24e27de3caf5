"""How time and memory grow with positions T, vocabulary V, support K and tensor-parallel ranks, at a fixed chunk.

One quantity varies, the others stay. The slope is that of a line through log time or log memory over log size (1 is
linear, 0 constant). Memory over T is fitted by a line too, at V and at 2 V: where its bytes a position have no term in
V, both are the same. Beside them stands 8 V, what both models' logits would take.

    python benchmarks/bench_growth.py --base 1024,256,512,16384 --factors 1 2 4 8
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import bench_tp
import common
import numpy as np
import torch
from contenders import heads, ours
from problem import Problem, Shape, make_problem

from megatron_taopd.teachability import token_statistics
from megatron_taopd.testing import WorkerPool

CHUNK_BYTES = 4 * common.MIB


def score(problem: Problem, k: int, chunk_bytes: int) -> None:
    token_statistics(
        problem.student_hidden_TH.detach(),
        problem.teacher_hidden_TH,
        problem.token_ids_T,
        *heads(problem),
        k=k,
        logits_chunk_bytes=chunk_bytes,
    )


def train(problem: Problem, k: int, chunk_bytes: int) -> None:
    """Loss and gradient on every row."""
    ours(1.0, "reverse", chunk_bytes)(problem)
    problem.take_grads()


Point = tuple[dict[str, float], common.Memory]
TRAIN = "loss + gradient, every row"
PHASES = {"scoring": score, TRAIN: train}


def measure_points(phase: str, points: list[tuple[Shape, int]], args: argparse.Namespace) -> list[Point]:
    """In a fresh process, for every shape and K: seconds, and peak above the inputs."""
    torch.set_num_threads(args.threads)
    result = []
    for shape, k in points:
        problem = make_problem(shape)
        run = partial(PHASES[phase], problem, k, args.logits_chunk_bytes)
        timing = common.time_all({phase: run}, rounds=args.rounds)[phase]
        seconds = {clock: timing.best(clock) for clock in ("wall", "cpu")}
        result.append((seconds, common.peak_memory(run, warmups=0)))
    return result


def slope(sizes: Sequence[float], values: list[float]) -> float:
    """Exponent of the power law through the points."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-9)), 1)[0])


def per_unit(sizes: Sequence[float], values: list[float]) -> float:
    """Slope of the line through the points."""
    return float(np.polyfit(sizes, values, 1)[0])


AXES = ("T", "T at 2 V", "V", "K")


def grow(phase: str, axis: str, base: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the table: the points along one axis, and their fits."""
    if axis == "T at 2 V":
        return {**grow(phase, "T", replace(base, vocab=2 * base.vocab), args), "axis": axis}
    smallest = {"T": base.tokens, "V": base.vocab, "K": args.support_k}[axis]
    sizes = [factor * smallest for factor in args.factors]
    points = []
    for size in sizes:
        shape = base if axis == "K" else replace(base, **{{"T": "tokens", "V": "vocab"}[axis]: size})
        points.append((shape, size if axis == "K" else args.support_k))
    measured: list[Point] = common.in_fresh_process(measure_points, phase, points, args)
    seconds = [times[args.clock] for times, _ in measured]
    tensors = [float(memory.tensors) for _, memory in measured]
    if axis == "V" and phase != "scoring":
        # The head's gradient [V, H] is wanted; what is above it is the question.
        tensors = [size - 4 * base.student_hidden * v for size, v in zip(tensors, sizes, strict=True)]
    return {
        "phase": phase,
        "axis": axis,
        "sizes": ", ".join(f"{size:,.0f}" for size in sizes),
        "seconds": ", ".join(f"{value:.3g}" for value in seconds),
        "time_slope": slope(sizes, seconds),
        "memory": ", ".join(f"{value / common.MIB:.1f}" for value in tensors),
        "memory_slope": slope(sizes, tensors),
        "memory_per_unit": per_unit(sizes, tensors),
        "logits_per_unit": {"T": 8.0 * base.vocab, "V": 8.0 * base.tokens}.get(axis),
        "resident": [memory.resident for _, memory in measured],
    }


RANKS_PHASES = ("scoring", "loss + gradient")


def grow_ranks(base: Shape, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time, received bytes and peak memory a rank over tensor-parallel ranks."""
    settings = {
        "k": args.support_k,
        "chunk_bytes": args.logits_chunk_bytes,
        "ratio": 1.0,
        "rounds": args.rounds,
        "loss": "reverse_kl",
        "phases": RANKS_PHASES,
        "memory": True,
    }
    answers = {}
    for ranks in args.ranks:
        with WorkerPool(ranks) as pool:
            answers[ranks] = pool.run(bench_tp.measure_rank, base, settings)
    rows = []
    for phase in RANKS_PHASES:
        # Rank by rank the rounds run side by side: a round takes as long as its slowest rank.
        seconds = [
            min(max(r) for r in zip(*(answer[phase][args.clock] for answer in answers[n]), strict=True))
            for n in args.ranks
        ]
        received = [sum(answers[n][0][phase]["received"].values()) / base.tokens for n in args.ranks]
        # The shard's gradient [V / ranks, H] is wanted; what is above it is the question.
        gradient = 4 * base.student_hidden * base.vocab if phase == "loss + gradient" else 0
        peak = [max(answer[phase]["memory"].tensors for answer in answers[n]) - gradient / n for n in args.ranks]
        rows.append(
            {
                "phase": phase,
                "sizes": ", ".join(map(str, args.ranks)),
                "seconds": ", ".join(f"{value:.3g}" for value in seconds),
                "time_slope": slope(args.ranks, seconds),
                "received": ", ".join(f"{value:,.0f}" for value in received),
                "received_per_rank": per_unit(args.ranks, received),
                "memory": ", ".join(f"{value / common.MIB:.1f}" for value in peak),
                "memory_slope": slope(args.ranks, peak),
            }
        )
    return rows


def measure(args: argparse.Namespace) -> list[common.Table]:
    base = Shape.parse(args.base)
    # The loss of the whole vocabulary has no K.
    lines = [(phase, axis) for phase in PHASES for axis in AXES if (phase, axis) != (TRAIN, "K")]
    rows = [grow(phase, axis, base, args) for phase, axis in lines if axis in args.axes]
    main_table = common.Table(
        name="growth",
        title=f"Growth: from {base}, K {args.support_k}, at a chunk of {args.logits_chunk_bytes / common.MIB:.3g} MiB",
        columns={
            "phase": "phase",
            "axis": "over",
            "sizes": "sizes",
            "seconds": "s (best)",
            "time_slope": "slope of log time",
            "memory": "peak MiB, tensors",
            "memory_slope": "slope of log memory",
            "memory_per_unit": "bytes a unit",
            "logits_per_unit": "whole logits would be",
        },
        rows=rows,
        notes=["Memory is above the inputs, and over V above the head's gradient too."],
    )
    ranks_table = common.Table(
        name="growth/ranks",
        title=f"Growth over tensor-parallel ranks: {base}",
        columns={
            "phase": "phase",
            "sizes": "TP",
            "seconds": f"{args.clock} s of the slowest rank",
            "time_slope": "slope of log time",
            "received": "bytes a row",
            "received_per_rank": "bytes a row and rank",
            "memory": "peak MiB a rank, tensors",
            "memory_slope": "slope of log memory",
        },
        rows=grow_ranks(base, args),
        notes=[
            f"One thread a rank; {os.cpu_count()} cores, which more ranks share. Memory is that of the rank with the "
            "most, above the inputs and its shard of the head's gradient."
        ],
    )
    return [main_table, ranks_table]


def main() -> None:
    parser = common.arguments(__doc__, threads=1, rounds=3)
    parser.add_argument("--base", default="1024,256,512,16384", metavar="T,H_STUDENT,H_TEACHER,V")
    parser.add_argument("--factors", type=int, nargs="+", default=(1, 2, 4, 8))
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES)
    parser.add_argument("--support-k", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--logits-chunk-bytes", type=int, default=CHUNK_BYTES)
    args = parser.parse_args()
    common.start(args)
    common.finish(measure(args), args, processes=max(args.ranks))


if __name__ == "__main__":
    main()
