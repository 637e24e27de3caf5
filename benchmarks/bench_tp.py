"""Tensor parallelism over gloo: bytes on the wire a position, by caller, beside the formula; and time.

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
from megatron_taopd.teachability.statistics import bytes_per_row
from megatron_taopd.testing import WorkerPool

SHAPES = ("512,256,512,8192", "512,256,512,32768")
FLOAT, DOUBLE = 4, 8
LOSS_SUMS = 5
"""Of a full-vocabulary KL a kept row: both models' maximum and mass, and one expectation."""


def shards(problem: Problem, rank: int, ranks: int) -> tuple[HeadShard, HeadShard]:
    """This rank's rows of both heads, as tensor parallelism cuts them."""
    vocab = problem.student_weight_VH.shape[0]
    own = slice(rank * vocab // ranks, (rank + 1) * vocab // ranks)
    group = torch.distributed.group.WORLD
    student = problem.student_weight_VH.detach()[own].clone().requires_grad_()
    teacher = problem.teacher_weight_VH[own].clone()
    return HeadShard(student, own.start, vocab, group), HeadShard(teacher, own.start, vocab, group)


def score(problem: Problem, heads: tuple[HeadShard, HeadShard], k: int, chunk_bytes: int) -> None:
    """Statistics of every row."""
    hidden = problem.student_hidden_TH.detach()
    token_statistics(
        hidden, problem.teacher_hidden_TH, problem.token_ids_T, *heads, k=k, logits_chunk_bytes=chunk_bytes
    )


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
    group = heads[0].group
    rows_R = given_rows(len(problem.token_ids_T), ratio)
    hidden_TH = problem.student_hidden_TH
    if sequence_parallel:
        hidden_TH = hidden_TH.tensor_split(group.size())[group.rank()]
    hidden = gather_rows(hidden_TH[:, None], rows_R, group=group, sequence_parallel=sequence_parallel)
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
    """On every rank: traffic and seconds of both phases."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problem = make_problem(shape)
    heads = shards(problem, rank, ranks)
    problem.student_weight_VH = torch.empty(0)
    k, chunk_bytes = settings["k"], settings["chunk_bytes"]
    scoring = partial(score, problem, heads, k, chunk_bytes)
    training = partial(train, problem, heads, k, chunk_bytes, settings["ratio"])
    phases = {
        "scoring": scoring,
        "loss + gradient": partial(training, False, settings["loss"]),
        "loss + gradient, sequence parallel": partial(training, True, settings["loss"]),
    }
    result = {}
    for name, run in phases.items():
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
    return result


def measure(shape: Shape, ranks: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table for one shape and one size of the group."""
    settings = {
        "k": args.support_k,
        "chunk_bytes": args.logits_chunk_bytes,
        "ratio": args.keep_ratio,
        "rounds": args.rounds,
        "loss": args.loss,
    }
    with WorkerPool(ranks) as pool:
        answers = pool.run(measure_rank, shape, settings)
    kept = len(given_rows(shape.tokens, args.keep_ratio))
    from_others = (ranks - 1) / ranks * FLOAT * shape.student_hidden  # the kept rows are spread evenly
    sums = (ranks - 1) * LOSS_SUMS * DOUBLE
    formula = {
        "scoring": bytes_per_row(args.support_k, ranks),
        "loss + gradient": sums + 2 * from_others,
        "loss + gradient, sequence parallel": sums + 3 * from_others,
    }
    rows = []
    for phase in answers[0]:
        positions = shape.tokens if phase == "scoring" else kept
        received = answers[0][phase]["received"]
        # Rank by rank the rounds run side by side: a round takes as long as its slowest rank.
        rounds = zip(*(answer[phase][args.clock] for answer in answers), strict=True)
        counted = sum(received.values()) / positions
        rows.append(
            {
                "shape": str(shape),
                "ranks": ranks,
                "phase": phase,
                "counted": counted,
                "formula": float(formula[phase]),
                "ratio": counted / formula[phase] if formula[phase] else None,
                "vocab": shape.vocab,
                "by_caller": ", ".join(f"{name}: {size / positions:,.4g}" for name, size in sorted(received.items())),
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
    tables = []
    for k in args.support_k:
        single = argparse.Namespace(**{**vars(args), "support_k": k})
        rows = [row for text in args.shapes for n in args.ranks for row in measure(Shape.parse(text), n, single)]
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
                    "by_caller": "bytes by caller",
                },
                rows=rows,
                notes=[
                    f"Bytes that a rank receives: a scored position, or a kept one (ρ = {args.keep_ratio:g}, "
                    f"{args.loss}). The formula of scoring is `teachability.statistics.bytes_per_row`; that of the "
                    f"loss is {LOSS_SUMS} sums from every other rank ({LOSS_SUMS * DOUBLE} bytes), the gradient of the "
                    "kept hidden states, 2 (P - 1) / P × 4 H bytes, and under sequence parallelism (P - 1) / P × 4 H "
                    f"for the states themselves. {args.clock} time of the slowest rank, one thread a rank."
                ],
            )
        )
    common.finish(tables, args, processes=max(args.ranks))


if __name__ == "__main__":
    main()
