"""Token statistics of every position against the bare products of both heads, and against a selection a token.

The floor is two matrix products into buffers that are used again, at our chunk and at the chunk that suits it best.
The selection a token is what released code does: two top-K lists a position, from a serving API, and Python
dictionaries over their union.

    python benchmarks/bench_score.py --shapes 2048,512,1024,32768 1024,1024,2048,151936
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import torch
from contenders import TRAIN_CHUNK_BYTES, chunk_rows, given_slices, heads
from problem import Problem, Shape, make_problem

from megatron_taopd.errors import ConfigError
from megatron_taopd.teachability import SelectionConfig, select, token_statistics

SHAPES = ("2048,512,1024,32768", "2048,576,576,49152", "1024,1024,2048,151936", "512,2048,2048,151936")
FLOOR_ROWS = (32, 64, 128, 256, 512, 1024)
FLOOR_BYTES = 2 * 2**30
"""No floor holds more logits than this."""
KEEP_RATIO = 0.1
MISSING = 1e-12
COMPILED = "token_statistics, compiled"

Rows = list[dict[int, float]]
"""A position's top-K as the API gives it: token id to log-probability."""


def two_products(problem: Problem, rows_a_chunk: int) -> None:
    """Logits of both models for every row, and nothing else."""
    weights = problem.student_weight_VH.detach(), problem.teacher_weight_VH
    hiddens = problem.student_hidden_TH.detach(), problem.teacher_hidden_TH
    size = min(rows_a_chunk, len(problem.token_ids_T))
    buffers = [torch.empty(size, weights[0].shape[0]) for _ in weights]
    for part in given_slices(len(problem.token_ids_T), size):
        for hidden_TH, weight_VH, buffer in zip(hiddens, weights, buffers, strict=True):
            torch.mm(hidden_TH[part], weight_VH.t(), out=buffer[: part.stop - part.start])


def our_statistics(problem: Problem, chunk_bytes: int, k: int, *, compiled: bool = False) -> Any:
    return token_statistics(
        problem.student_hidden_TH.detach(),
        problem.teacher_hidden_TH,
        problem.token_ids_T,
        *heads(problem),
        k=k,
        logits_chunk_bytes=chunk_bytes,
        compiled=compiled,
    )


def compile_once(problem: Problem, chunk_bytes: int, k: int) -> tuple[dict[str, Callable[[], Any]], str]:
    """The statistics with compiled passes as a contender, after its first call; nothing where no compiler is there.
    And what to say of it."""
    run = partial(our_statistics, problem, chunk_bytes, k, compiled=True)
    started = time.perf_counter()
    try:
        run()
    except ConfigError as error:
        return {}, f"{COMPILED} left out: {error}"
    seconds = time.perf_counter() - started
    return {COMPILED: run}, f"The first call of {COMPILED} took {seconds:.1f} s (a table before may have compiled it)."


def our_statistics_and_selection(problem: Problem, chunk_bytes: int, k: int) -> torch.Tensor:
    tokens = problem.token_ids_T
    return select(
        our_statistics(problem, chunk_bytes, k),
        sample_index_R=torch.zeros_like(tokens),
        position_R=torch.arange(len(tokens)),
        config=SelectionConfig(keep_ratio=KEEP_RATIO),
    ).keep


def whole_log_probs_and_python(problem: Problem, k: int) -> list[bool]:
    """Log-probabilities of whole rows, as a serving engine forms them, their top-K lists, then Python."""
    lists = [
        top_k_lists(hidden @ weight.t(), k)
        for hidden, weight in (
            (problem.student_hidden_TH.detach(), problem.student_weight_VH.detach()),
            (problem.teacher_hidden_TH, problem.teacher_weight_VH),
        )
    ]
    return python_selection(*lists)


def top_k_lists(logits_TV: torch.Tensor, k: int) -> Rows:
    values, ids = logits_TV.log_softmax(-1).topk(k)
    return [dict(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]


def python_selection(student: Rows, teacher: Rows) -> list[bool]:
    """D and C from the two lists, position by position; quantiles; the best tenth."""
    divergences, compatibilities = [], []
    for student_top, teacher_top in zip(student, teacher, strict=True):
        union = sorted(set(student_top) | set(teacher_top))
        p_s = [math.exp(student_top[v]) if v in student_top else MISSING for v in union]
        p_t = [math.exp(teacher_top[v]) if v in teacher_top else MISSING for v in union]
        sum_s, sum_t = sum(p_s), sum(p_t)
        divergences.append(
            sum(t / sum_t * (math.log(t / sum_t) - math.log(s / sum_s)) for s, t in zip(p_s, p_t, strict=True))
        )
        compatibilities.append(sum(math.exp(teacher_top[v]) for v in student_top if v in teacher_top))
    scores = [d * c for d, c in zip(_scaled(divergences), _scaled(compatibilities), strict=True)]
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept = set(order[: math.ceil(KEEP_RATIO * len(scores))])
    return [i in kept for i in range(len(scores))]


def _scaled(values: list[float]) -> list[float]:
    low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64))
    spread = float(high - low)
    return [min(max((x - float(low)) / spread, 0.0), 1.0) if spread > 0 else 0.0 for x in values]


def memory_of(shape: Shape, chunk_bytes: int, k: int, threads: int) -> common.Memory:
    """In a fresh process: peak of the statistics above their inputs."""
    torch.set_num_threads(threads)
    problem = make_problem(shape, requires_grad=False)
    return common.peak_memory(partial(our_statistics, problem, chunk_bytes, k))


def check(problem: Problem, chunk_bytes: int, k: int) -> None:
    """The statistics are those of whole log-softmaxes, on some rows."""
    statistics = our_statistics(problem, chunk_bytes, k)
    rows = slice(0, min(16, len(problem.token_ids_T)))
    log_s = (problem.student_hidden_TH[rows].double() @ problem.student_weight_VH.double().t()).log_softmax(-1)
    log_t = (problem.teacher_hidden_TH[rows].double() @ problem.teacher_weight_VH.double().t()).log_softmax(-1)
    expected = {
        "H": -(log_s.exp() * log_s).sum(-1),
        "kl_reverse": (log_s.exp() * (log_s - log_t)).sum(-1),
        "C": log_t.gather(-1, log_s.topk(k).indices).exp().sum(-1),
    }
    for name, values in expected.items():
        if not torch.allclose(getattr(statistics, name)[rows].double(), values, rtol=1e-3, atol=1e-4):
            raise SystemExit(f"{name} is not that of whole log-softmaxes: {getattr(statistics, name)[rows]}, {values}")


def measure(shape: Shape, args: argparse.Namespace) -> common.Table:
    chunk_bytes, k = args.logits_chunk_bytes, args.support_k
    chunk = chunk_rows(shape.vocab, chunk_bytes)
    problem = make_problem(shape, requires_grad=False)
    check(problem, chunk_bytes, k)
    compiled, compiled_note = ({}, None) if args.no_compiled else compile_once(problem, chunk_bytes, k)
    sizes = sorted({chunk, *(rows for rows in args.floor_rows if 8 * rows * shape.vocab <= FLOOR_BYTES)})
    floors = {f"two products, {rows} rows a chunk": rows for rows in sizes if rows <= max(chunk, shape.tokens)}
    runs: dict[str, Callable[[], Any]] = {
        "token_statistics": partial(our_statistics, problem, chunk_bytes, k),
        "token_statistics + select": partial(our_statistics_and_selection, problem, chunk_bytes, k),
        **compiled,
        **{name: partial(two_products, problem, rows) for name, rows in floors.items()},
    }
    if 8 * shape.tokens * shape.vocab <= FLOOR_BYTES:
        runs["whole log-softmaxes, top-K, Python a position"] = partial(whole_log_probs_and_python, problem, k)
    times = common.time_all(runs, rounds=args.rounds, budget=args.budget)
    # The Python part alone: its lists come from elsewhere.
    lists = (
        [
            top_k_lists(hidden @ weight.t(), k)
            for hidden, weight in (
                (problem.student_hidden_TH, problem.student_weight_VH),
                (problem.teacher_hidden_TH, problem.teacher_weight_VH),
            )
        ]
        if 8 * shape.tokens * shape.vocab <= FLOOR_BYTES
        else None
    )
    if lists is not None:
        times |= common.time_all({"of that, Python": partial(python_selection, *lists)}, rounds=args.rounds)
    del runs, problem

    same = times[f"two products, {chunk} rows a chunk"].best(args.clock)
    best = min(times[name].best(args.clock) for name in floors)
    rows: list[dict[str, Any]] = []
    for name, timing in times.items():
        seconds = timing.best(args.clock)
        rows.append(
            {
                "contender": name,
                "best": seconds,
                "median": timing.median(args.clock),
                "rows_a_second": shape.tokens / seconds,
                "ratio_same_chunk": seconds / same,
                "ratio_best_floor": seconds / best,
                "samples": {"wall": timing.wall, "cpu": timing.cpu},
            }
        )
    notes = [f"K = {k}, fp32, {args.clock} time, {args.rounds} rounds at most; our chunk is {chunk} rows."]
    if compiled_note is not None:
        notes.append(compiled_note)
    if not args.no_memory:
        memory = common.in_fresh_process(memory_of, shape, chunk_bytes, k, args.threads)
        rows[0] |= {"resident_mib": memory.resident / common.MIB, "tensors_mib": memory.tensors / common.MIB}
        notes.append(
            f"token_statistics holds {rows[0]['resident_mib']:.0f} MiB above its inputs (resident; tensors: "
            f"{rows[0]['tensors_mib']:.0f} MiB); both models' whole logits would be "
            f"{8 * shape.tokens * shape.vocab / common.MIB:,.0f} MiB."
        )
    return common.Table(
        name=f"score/{shape.tokens}x{shape.vocab}",
        title=f"Scoring: {shape}",
        columns={
            "contender": "every position",
            "best": "s (best)",
            "median": "s (median)",
            "rows_a_second": "positions/s",
            "ratio_same_chunk": "÷ products, our chunk",
            "ratio_best_floor": "÷ products, their best chunk",
        },
        rows=rows,
        notes=notes,
    )


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="T,H_STUDENT,H_TEACHER,V")
    parser.add_argument("--support-k", type=int, default=16)
    parser.add_argument(
        "--logits-chunk-bytes", type=int, default=TRAIN_CHUNK_BYTES, help="ours; the default is taopd train's"
    )
    parser.add_argument("--floor-rows", type=int, nargs="+", default=FLOOR_ROWS, help="chunks tried for the floor")
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("--no-compiled", action="store_true", help="without the compiled statistics")
    args = parser.parse_args()
    common.start(args)
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty  # so that compiling takes what it takes the first time
        common.finish([measure(Shape.parse(text), args) for text in args.shapes], args)


if __name__ == "__main__":
    main()
