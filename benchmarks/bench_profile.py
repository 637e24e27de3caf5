"""Where the statistics and our loss of every row spend their time, by kind of operation.

python benchmarks/bench_profile.py --shapes 2048,512,1024,32768 1024,1024,2048,151936
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import bench_score
import common
from contenders import TRAIN_CHUNK_BYTES, ours
from op_kinds import seconds_by_kind, shares_row, shares_table
from problem import Problem, Shape, make_problem

SHAPES = ("2048,512,1024,32768", "1024,1024,2048,151936")


def score(problem: Problem, args: argparse.Namespace) -> None:
    bench_score.our_statistics(problem, args.logits_chunk_bytes, args.support_k)


def train(problem: Problem, args: argparse.Namespace) -> None:
    ours(1.0, "reverse", args.logits_chunk_bytes)(problem)
    problem.take_grads()


CALLS: dict[str, Callable[[Problem, argparse.Namespace], None]] = {
    "token_statistics": score,
    "ours, ρ = 1 (reverse KL, loss + gradient)": train,
}


def measure(args: argparse.Namespace) -> common.Table:
    rows: list[dict[str, Any]] = []
    for text in args.shapes:
        shape = Shape.parse(text)
        problem = make_problem(shape)
        for name, call in CALLS.items():
            call(problem.first_rows(args.warm_rows), args)
            runs = [seconds_by_kind(lambda call=call, problem=problem: call(problem, args)) for _ in range(args.rounds)]
            rows.append(shares_row({"call": name, "shape": str(shape)}, min(runs, key=lambda run: sum(run.values()))))
    return shares_table(
        "profile",
        f"Profile, {args.logits_chunk_bytes / common.MIB:.3g} MiB a chunk, K = {args.support_k}",
        {"call": "call", "shape": "shape"},
        rows,
    )


def main() -> None:
    parser = common.arguments(__doc__, rounds=1)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="T,H_STUDENT,H_TEACHER,V")
    parser.add_argument("--support-k", type=int, default=16)
    parser.add_argument("--logits-chunk-bytes", type=int, default=TRAIN_CHUNK_BYTES)
    parser.add_argument("--warm-rows", type=int, default=256, help="of an unprofiled call before")
    args = parser.parse_args()
    common.start(args)
    common.finish([measure(args)], args)


if __name__ == "__main__":
    main()
