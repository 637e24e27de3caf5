"""Loss and gradient (hidden states and LM head) of the full-vocabulary KL: time, and peak memory above the inputs and
the head's gradient. Every contender is first checked against dense torch.

    python benchmarks/bench_loss.py --shapes 2048,512,1024,32768 1024,1024,2048,151936
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import common
import torch
from contenders import (
    LIGER,
    TRAIN_CHUNK_BYTES,
    TRL,
    Contender,
    chunk_rows,
    dense_torch,
    forward_products,
    given_rows,
    liger,
    matrix_products,
    ours,
    ours_with_scoring,
    selected_rows,
    trl_chunked,
    trl_gkd,
)
from problem import Problem, Shape, make_problem

SHAPES = ("2048,512,1024,32768", "1024,1024,2048,151936")
LIGER_CHUNK = 1024
RATIOS = (1.0, 0.1, 0.05)
WARM_ROWS = 256
DENSE = "dense torch"
SCORING_PRODUCTS = "two products, all rows"
"""What scoring cannot avoid: logits of both models, without a gradient."""
LOSS_TOLERANCE, GRAD_TOLERANCE = 1e-4, 1e-3


class Entry(NamedTuple):
    """A line of the table."""

    make: Callable[[], Contender]
    rows: Callable[[Problem], torch.Tensor] | None = None
    """Rows that it takes the loss on; None means all of them."""
    checked: bool = True
    """Against dense torch; bare products are not, nor is their memory measured."""
    packages: tuple[str, ...] = ()
    """Those of a peer."""
    compiled: bool = False
    """Its first call at a shape compiles."""


def entries(shape: Shape, kl: str, chunk_bytes: int) -> dict[str, Entry]:
    """Every line by name."""
    chunk = chunk_rows(shape.vocab, chunk_bytes)
    lines = {
        DENSE: Entry(partial(dense_torch, kl)),
        "TRL GKD loss": Entry(partial(trl_gkd, kl), packages=TRL),
        "TRL chunked (DistillationTrainer)": Entry(partial(trl_chunked, kl), packages=TRL),
    }
    ways = [(LIGER_CHUNK, False), (LIGER_CHUNK, True), (chunk, True)]
    for rows_a_chunk, compiled in dict.fromkeys(ways):
        name = f"Liger {'compiled' if compiled else 'eager'}, {_chunk_name(rows_a_chunk, chunk)}"
        make = partial(liger, kl, compiled=compiled, rows_a_chunk=rows_a_chunk)
        lines[name] = Entry(make, packages=LIGER, compiled=compiled)
    for ratio in RATIOS:
        rows = None if ratio == 1.0 else _given(ratio)
        lines[f"ours, ρ = {ratio:g}"] = Entry(partial(ours, ratio, kl, chunk_bytes), rows)
    for ratio in RATIOS[1:]:
        lines[f"ours, ρ = {ratio:g}, with scoring of all rows"] = Entry(
            partial(ours_with_scoring, ratio, kl, chunk_bytes), _selected(ratio, chunk_bytes)
        )
    for ratio in RATIOS:
        lines[f"matrix products alone, ρ = {ratio:g}"] = Entry(partial(matrix_products, ratio, chunk), checked=False)
    lines[SCORING_PRODUCTS] = Entry(partial(forward_products, chunk_bytes), checked=False)
    return lines


def _chunk_name(rows_a_chunk: int, ours: int) -> str:
    return "our chunk" if rows_a_chunk == ours else f"its chunk ({rows_a_chunk})"


def _given(ratio: float) -> Callable[[Problem], torch.Tensor]:
    return lambda problem: given_rows(len(problem.token_ids_T), ratio)


def _selected(ratio: float, chunk_bytes: int) -> Callable[[Problem], torch.Tensor]:
    return lambda problem: selected_rows(problem, ratio, chunk_bytes)


class Answer(NamedTuple):
    """Loss, and gradients of hidden states and head."""

    loss: torch.Tensor
    hidden: torch.Tensor | None
    weight: torch.Tensor | None


def answer_of(run: Contender, problem: Problem) -> Answer:
    return Answer(run(problem), *problem.take_grads())


def check(name: str, run: Contender, problem: Problem, reference: Answer) -> None:
    """Both give one loss and one gradient, or the comparison would mean nothing."""
    expected, hidden_0, weight_0 = reference
    loss, hidden_1, weight_1 = answer_of(run, problem)
    error = {"loss": float((loss - expected).abs() / expected.abs())}
    for part, ours_, theirs in (("hidden", hidden_1, hidden_0), ("weight", weight_1, weight_0)):
        assert ours_ is not None and theirs is not None
        error[part] = float((ours_ - theirs).norm() / theirs.norm())
    # Not "greater than": a NaN must fail too.
    if not (error["loss"] < LOSS_TOLERANCE and max(error["hidden"], error["weight"]) < GRAD_TOLERANCE):
        raise SystemExit(f"{name} and dense torch differ (relative): {error}")


def memory_of(name: str, shape: Shape, kl: str, chunk_bytes: int, threads: int) -> common.Memory:
    """In a fresh process: peak of one contender above its inputs."""
    torch.set_num_threads(threads)
    problem = make_problem(shape)
    entry = entries(shape, kl, chunk_bytes)[name]
    run = entry.make()
    # Threads and their workspaces are there after a few rows, what is compiled after all of them.
    _call(run, problem if entry.compiled else problem.first_rows(WARM_ROWS))
    return common.peak_memory(partial(_call, run, problem), warmups=0)


def measure(shape: Shape, args: argparse.Namespace) -> common.Table:
    lines = entries(shape, args.kl, args.logits_chunk_bytes)
    if args.only:
        lines = {name: e for name, e in lines.items() if any(part in name for part in [DENSE, *args.only])}
    absent = {name: reason for name, entry in lines.items() if (reason := common.missing_peer(*entry.packages))}
    contenders = {name: entry.make() for name, entry in lines.items() if name not in absent}
    problem = make_problem(shape)
    of_all_rows = answer_of(contenders[DENSE], problem)
    for name, run in contenders.items():
        rows_of = lines[name].rows
        if lines[name].checked and name != DENSE:
            check(name, run, problem, answer_of(dense_torch(args.kl, rows_of), problem) if rows_of else of_all_rows)
    del of_all_rows
    runs = {name: partial(_call, run, problem) for name, run in contenders.items()}
    # Checking has warmed up all but the bare products.
    times = common.time_all(runs, rounds=args.rounds, warmups=0, budget=args.budget)
    del problem, runs

    weight_gradient = 4 * shape.vocab * shape.student_hidden
    rows: list[dict[str, Any]] = []
    for name, timing in times.items():
        row: dict[str, Any] = {"contender": name, "best": timing.best(args.clock), "median": timing.median(args.clock)}
        row["samples"] = {"wall": timing.wall, "cpu": timing.cpu}
        if not args.no_memory and lines[name].checked:
            memory = common.in_fresh_process(memory_of, name, shape, args.kl, args.logits_chunk_bytes, args.threads)
            row["resident_mib"] = (memory.resident - weight_gradient) / common.MIB
            row["tensors_mib"] = (memory.tensors - weight_gradient) / common.MIB
        rows.append(row)
    dense = rows[0]
    for row in rows:
        for key in ("best", "resident_mib", "tensors_mib"):
            if key in row:
                row[f"{key}_ratio"] = row[key] / dense[key]
    columns = {"contender": "loss + gradient", "best": "s (best)", "median": "s (median)", "best_ratio": "÷ dense"}
    if not args.no_memory:
        columns |= {
            "resident_mib": "peak MiB, resident",
            "resident_mib_ratio": "÷ dense",
            "tensors_mib": "peak MiB, tensors",
            "tensors_mib_ratio": "÷ dense",
        }
    chunk_mib, chunk = args.logits_chunk_bytes / common.MIB, chunk_rows(shape.vocab, args.logits_chunk_bytes)
    notes = [
        f"{args.kl} KL, fp32, {args.clock} time, {args.rounds} rounds at most. Memory is above the inputs and the "
        f"head's gradient ({weight_gradient / common.MIB:,.0f} MiB). Our chunk is {chunk_mib:.3g} MiB of one model's "
        f"logits: {chunk} rows."
    ]
    notes += [f"{name} left out: {reason}." for name, reason in absent.items()]
    key = f"loss/{shape.tokens}x{shape.vocab}"
    return common.Table(name=key, title=f"Loss and gradient: {shape}", columns=columns, rows=rows, notes=notes)


def _call(run: Contender, problem: Problem) -> None:
    run(problem)
    problem.take_grads()


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="T,H_STUDENT,H_TEACHER,V")
    parser.add_argument("--kl", choices=("reverse", "forward"), default="reverse")
    parser.add_argument(
        "--logits-chunk-bytes", type=int, default=TRAIN_CHUNK_BYTES, help="ours; the default is taopd train's"
    )
    parser.add_argument("--only", nargs="+", help="lines whose name has one of these (and dense torch)")
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    args = parser.parse_args()
    common.start(args)
    common.finish([measure(Shape.parse(text), args) for text in args.shapes], args)


if __name__ == "__main__":
    main()
