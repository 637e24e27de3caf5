"""Tensor parallelism over gloo: bytes on the wire a position, by quantity, beside the formula; and time.

python benchmarks/bench_tp.py --shapes 512,256,512,8192 512,256,512,32768 --ranks 1 2 4
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import common
import torch
from contenders import TRAIN_CHUNK_BYTES, given_rows
from problem import Problem, Shape, make_problem
from wire import Wire

from megatron_taopd.losses import LossConfig, distillation_loss
from megatron_taopd.ops import HeadShard, gather_rows
from megatron_taopd.teachability import token_statistics
from megatron_taopd.teachability.softmax_sums import NUM_SUMS
from megatron_taopd.testing import WorkerPool

SHAPES = ("512,256,512,8192", "512,256,512,32768")
FLOAT, DOUBLE = 4, 8
LOSS_SUMS = 5
"""Of a full-vocabulary KL a kept row: both models' maximum and mass, and one expectation."""
SCORED = {"candidates": lambda k: 6 * k, "sums": lambda k: NUM_SUMS, "token": lambda k: 2}
"""fp32 numbers of a scored row from every other rank. A candidate is a logit, an id and the other model's logit, K of
either model; the sums are both models' softmax sums; the token's are its logits."""
STATES, GRADIENTS, SUMS = "hidden states", "their gradients", "sums"
QUANTITIES = {
    "ops.rows._collect": STATES,
    "ops.rows.backward": GRADIENTS,
    "ops.rows._sum_for_owners": GRADIENTS,
    "losses.fused._normalise": SUMS,
}
"""What a caller of a collective moves; the one of scoring moves all of :data:`SCORED` at once."""


def shards(problem: Problem, rank: int, ranks: int) -> tuple[HeadShard, HeadShard]:
    """This rank's rows of both heads, as tensor parallelism cuts them."""
    vocab = problem.student_weight_VH.shape[0]
    own = slice(rank * vocab // ranks, (rank + 1) * vocab // ranks)
    group = torch.distributed.group.WORLD
    student = problem.student_weight_VH.detach()[own].clone().requires_grad_()
    teacher = problem.teacher_weight_VH[own].clone()
    return HeadShard(student, own.start, vocab, group), HeadShard(teacher, own.start, vocab, group)


def formula(phase: str, shape: Shape, ranks: int, k: int) -> dict[str, float]:
    """Bytes that a rank receives a position, by quantity, as in docs/performance.md. Rows are spread evenly."""
    from_others = (ranks - 1) / ranks * FLOAT
    student = from_others * shape.student_hidden
    if phase.startswith("scoring"):
        expected = {name: (ranks - 1) * FLOAT * float(numbers(k)) for name, numbers in SCORED.items()}
        states = student + from_others * shape.teacher_hidden
    else:
        expected = {SUMS: float((ranks - 1) * LOSS_SUMS * DOUBLE)}
        # All-reduced to all ranks, or sent to the rank whose rows they are.
        expected[GRADIENTS] = student if "sequence parallel" in phase else 2 * student
        states = student
    if "sequence parallel" in phase:
        expected[STATES] = states
    return expected


def by_quantity(received: dict[str, float], k: int) -> dict[str, float]:
    """Counted bytes of callers as those of quantities; a caller that is not known keeps its name."""
    found: dict[str, float] = {}
    numbers = {name: count(k) for name, count in SCORED.items()}
    for caller, size in received.items():
        if caller.startswith("teachability.reading."):
            parts = {name: size * count / sum(numbers.values()) for name, count in numbers.items()}
        else:
            parts = {QUANTITIES.get(caller.split(" ")[0], caller): size}
        for name, part in parts.items():
            found[name] = found.get(name, 0.0) + part
    return found


def rows_of(
    hidden_TH: torch.Tensor, rows_R: torch.Tensor, group: torch.distributed.ProcessGroup, sequence_parallel: bool
) -> torch.Tensor:
    """Rows of hidden states, which every rank has whole, or under sequence parallelism a slice of the sequence each."""
    if sequence_parallel:
        hidden_TH = hidden_TH.tensor_split(group.size())[group.rank()]
    return gather_rows(hidden_TH[:, None], rows_R, group=group, sequence_parallel=sequence_parallel)


def score(
    problem: Problem, heads: tuple[HeadShard, HeadShard], k: int, chunk_bytes: int, sequence_parallel: bool
) -> None:
    """Statistics of every row, from the gathering of the rows on."""
    group = heads[0].group
    rows_R = torch.arange(len(problem.token_ids_T))
    student, teacher = (
        rows_of(hidden_TH, rows_R, group, sequence_parallel)
        for hidden_TH in (problem.student_hidden_TH.detach(), problem.teacher_hidden_TH)
    )
    token_statistics(student, teacher, problem.token_ids_T, *heads, k=k, logits_chunk_bytes=chunk_bytes)


def train(
    problem: Problem,
    heads: tuple[HeadShard, HeadShard],
    k: int,
    chunk_bytes: int,
    ratio: float,
    sequence_parallel: bool,
    loss: str,
) -> None:
    """Loss and gradient on the kept rows, from the gathering of the rows on."""
    rows_R = given_rows(len(problem.token_ids_T), ratio)
    hidden = rows_of(problem.student_hidden_TH, rows_R, heads[0].group, sequence_parallel)
    total, _ = distillation_loss(
        hidden,
        problem.teacher_hidden_TH[rows_R],
        problem.token_ids_T[rows_R],
        torch.zeros(len(rows_R)),
        *heads,
        config=LossConfig(loss=loss),
        k=k,
        logits_chunk_bytes=chunk_bytes,
    )
    total.backward()
    problem.take_grads()
    heads[0].weight.grad = None


def measure_rank(shape: Shape, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """On every rank: traffic and seconds of all phases, and if wanted their peak of memory."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problem = make_problem(shape)
    heads = shards(problem, rank, ranks)
    problem.student_weight_VH = torch.empty(0)
    k, chunk_bytes = settings["k"], settings["chunk_bytes"]
    scoring = partial(score, problem, heads, k, chunk_bytes)
    training = partial(train, problem, heads, k, chunk_bytes, settings["ratio"])
    phases = {
        "scoring": partial(scoring, False),
        "scoring, sequence parallel": partial(scoring, True),
        "loss + gradient": partial(training, False, settings["loss"]),
        "loss + gradient, sequence parallel": partial(training, True, settings["loss"]),
    }
    result = {}
    for name in settings.get("phases", phases):
        run = phases[name]
        wire = Wire()
        with wire.counting():
            run()
        wall, cpu = [], []
        for _ in range(settings["rounds"]):
            torch.distributed.barrier()
            wall_0, cpu_0 = time.perf_counter(), time.process_time()
            run()
            cpu.append(time.process_time() - cpu_0)
            wall.append(time.perf_counter() - wall_0)
        result[name] = {"received": dict(wire.received), "calls": dict(wire.calls), "wall": wall, "cpu": cpu}
        if settings.get("memory"):
            result[name]["memory"] = common.peak_memory(run, warmups=0)
    return result


def measure(shape: Shape, k: int, pool: WorkerPool, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table for one shape and one size of the group."""
    ranks = pool.world_size
    settings = {
        "k": k,
        "chunk_bytes": args.logits_chunk_bytes,
        "ratio": args.keep_ratio,
        "rounds": args.rounds,
        "loss": args.loss,
    }
    answers = pool.run(measure_rank, shape, settings)
    kept = len(given_rows(shape.tokens, args.keep_ratio))
    rows = []
    for phase in answers[0]:
        positions = shape.tokens if phase.startswith("scoring") else kept
        expected = sum(formula(phase, shape, ranks, k).values())
        received = answers[0][phase]["received"]
        # Rank by rank the rounds run side by side: a round takes as long as its slowest rank.
        rounds = zip(*(answer[phase][args.clock] for answer in answers), strict=True)
        counted = sum(received.values()) / positions
        rows.append(
            {
                "shape": str(shape),
                "ranks": ranks,
                "phase": phase,
                "k": k,
                "counted": counted,
                "formula": expected,
                "ratio": counted / expected if expected else None,
                "vocab": shape.vocab,
                "by_quantity": ", ".join(
                    f"{name} {size / positions:,.4g}" for name, size in by_quantity(received, k).items()
                ),
                "by_caller": {name: size / positions for name, size in received.items()},
                "calls": answers[0][phase]["calls"],
                "best": min(max(seconds) for seconds in rounds),
            }
        )
    return rows


def main() -> None:
    parser = common.arguments(__doc__, threads=1, rounds=3)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="T,H_STUDENT,H_TEACHER,V")
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--support-k", type=int, nargs="+", default=(16,))
    parser.add_argument("--keep-ratio", type=float, default=0.1)
    parser.add_argument("--loss", choices=("reverse_kl", "forward_kl"), default="reverse_kl")
    parser.add_argument("--logits-chunk-bytes", type=int, default=TRAIN_CHUNK_BYTES)
    args = parser.parse_args()
    common.start(args)
    shapes = [Shape.parse(text) for text in args.shapes]
    found: dict[tuple[int, Shape, int], list[dict[str, Any]]] = {}
    for ranks in args.ranks:
        with WorkerPool(ranks) as pool:
            for k in args.support_k:
                found |= {(k, shape, ranks): measure(shape, k, pool, args) for shape in shapes}
    tables = []
    for k in args.support_k:
        rows = [row for shape in shapes for ranks in args.ranks for row in found[k, shape, ranks]]
        tables.append(
            common.Table(
                name=f"tp/k{k}",
                title=f"Tensor parallelism over gloo, K = {k}",
                columns={
                    "shape": "shape",
                    "ranks": "TP",
                    "phase": "phase",
                    "counted": "bytes a position",
                    "formula": "formula",
                    "ratio": "÷ formula",
                    "best": "s (best)",
                    "by_quantity": "bytes by quantity",
                },
                rows=rows,
                notes=[
                    f"Bytes that a rank receives: a scored position, or a kept one (ρ = {args.keep_ratio:g}, "
                    f"{args.loss}). The formulas are those of docs/performance.md, with kept rows spread evenly over "
                    f"the ranks. {args.clock} time of the slowest rank, one thread a rank."
                ],
            )
        )
    common.finish(tables, args, processes=max(args.ranks))


if __name__ == "__main__":
    main()
