"""Selection by FP8 heads against selection by exact ones on random heads of Qwen3's shape, flat and peaked.

    python benchmarks/fp8_heads.py [--rows 2048] [--vocab 151936] [--hidden 1024] [--out FILE.json]

Teacher and student differ by noise on hidden states and heads. ``flat``: logits spread by 2; ``peaked``: by 5, a few
ids hold nearly all mass; ``outlying``: peaked, with 4 channels of the hidden states 30 times the others, as in real
models.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from megatron_taopd.ops import HeadShard
from megatron_taopd.ops.fp8 import Fp8Head
from megatron_taopd.teachability import SelectionConfig, TokenStatistics, select, token_statistics
from megatron_taopd.training.head_comparison import DIFFERENCES, agreement, comparison_table

SPREADS = {"flat": 2.0, "peaked": 5.0, "outlying": 5.0}


def make_rows(kind: str, rows: int, vocab: int, width: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Hidden states and heads of student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    student_hidden = torch.randn(rows, width, generator=generator)
    student_head = torch.randn(vocab, width, generator=generator)
    teacher_hidden = student_hidden + 0.3 * torch.randn(rows, width, generator=generator)
    teacher_head = student_head + 0.1 * torch.randn(vocab, width, generator=generator)
    if kind == "outlying":
        for hidden in (student_hidden, teacher_hidden):
            hidden[:, :4] *= 30
    heads_hidden = []
    for hidden, head in ((student_hidden, student_head), (teacher_hidden, teacher_head)):
        spread = (hidden[:8] @ head[:4096].t()).std(-1).mean()
        # Rows differ in how sure they are, as positions of a text do.
        sureness = 0.5 + torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed + 1))
        heads_hidden += [hidden * sureness * (SPREADS[kind] / spread), head]
    return tuple(heads_hidden)


def columns_of(statistics: TokenStatistics, config: SelectionConfig) -> dict:
    """As a comparison wants them; every row is a response of its own."""
    index = torch.arange(len(statistics))
    place = {"sample_index_R": index // 64, "position_R": index % 64}
    keep = select(statistics, **place, config=config, group=None, sample_group=None, seed=0, step=0).keep
    return {"keep": keep.numpy(), **{name: getattr(statistics, name).numpy() for name in DIFFERENCES}}


def compare(kind: str, rows: int, vocab: int, width: int, config: SelectionConfig, seed: int) -> dict:
    """Figures of ``taopd score --compare`` for one kind of head."""
    student_hidden, student_weight, teacher_hidden, teacher_weight = make_rows(kind, rows, vocab, width, seed)
    tokens = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed + 2))
    exact = (HeadShard(student_weight, 0, vocab), HeadShard(teacher_weight, 0, vocab))
    rough = (Fp8Head.of(exact[0]), Fp8Head.of(exact[1]))
    bf16 = (HeadShard(student_weight.bfloat16(), 0, vocab), HeadShard(teacher_weight.bfloat16(), 0, vocab))
    hidden = (student_hidden, teacher_hidden)
    ways = {
        "model": (hidden, exact, None),
        "bf16": (tuple(rows_RH.bfloat16() for rows_RH in hidden), bf16, None),
        "fp8-1": (hidden, rough, None),
        "fp8-2": (hidden, exact, rough),
    }
    columns, seconds = {}, {}
    for name, (own_hidden, heads, rough_heads) in ways.items():
        started = time.perf_counter()
        statistics = token_statistics(*own_hidden, tokens, *heads, rough_heads=rough_heads, k=config.support_k)
        seconds[name] = round(time.perf_counter() - started, 2)
        columns[name] = columns_of(statistics, config)
    reference = columns.pop("model")
    return {
        "positions": rows,
        "kept": int(reference["keep"].sum()),
        "heads": {name: agreement(reference, other) for name, other in columns.items()},
        "cpu_seconds": seconds,
    }


def main() -> None:
    """Print a table a kind of head, and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--keep-ratio", type=float, default=0.05)
    parser.add_argument("--kinds", nargs="+", choices=SPREADS, default=list(SPREADS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = SelectionConfig(keep_ratio=args.keep_ratio)
    found = {}
    for kind in args.kinds:
        found[kind] = compare(kind, args.rows, args.vocab, args.hidden, config, args.seed)
        print(f"\n{kind}: {args.rows} rows, {found[kind]['kept']} kept, V {args.vocab}, H {args.hidden}")
        print(comparison_table(found[kind]), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps({"arguments": vars(args) | {"out": str(args.out)}, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
