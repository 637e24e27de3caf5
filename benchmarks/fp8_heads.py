"""Selection by FP8 heads against selection by exact ones on random heads of Qwen3's shape, flat and peaked.

    python benchmarks/fp8_heads.py [--rows 2048] [--vocab 151936] [--hidden 1024] [--device cpu] [--out FILE.json]

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

Hidden = tuple[torch.Tensor, torch.Tensor]
Heads = tuple[HeadShard, HeadShard]
SPREADS = {"flat": 2.0, "peaked": 5.0, "outlying": 5.0}


def make_rows(kind: str, rows: int, vocab: int, width: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Hidden states and heads of student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    student_hidden = torch.randn(rows, width, generator=generator)
    student_head = torch.randn(vocab, width, generator=generator)
    teacher_hidden = student_hidden + 0.3 * torch.randn(rows, width, generator=generator)
    teacher_head = torch.randn(vocab, width, generator=generator).mul_(0.1).add_(student_head)
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
    index = torch.arange(len(statistics), device=statistics.D.device)
    place = {"sample_index_R": index // 64, "position_R": index % 64}
    keep = select(statistics, **place, config=config, group=None, sample_group=None, seed=0, step=0).keep
    return {"keep": keep.cpu().numpy(), **{name: getattr(statistics, name).cpu().numpy() for name in DIFFERENCES}}


def compare(
    kind: str, rows: int, vocab: int, width: int, config: SelectionConfig, seed: int, device: torch.device
) -> dict:
    """Figures of ``taopd score --compare`` for one kind of head."""
    made = (part.to(device) for part in make_rows(kind, rows, vocab, width, seed))
    student_hidden, student_weight, teacher_hidden, teacher_weight = made
    tokens = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed + 2)).to(device)
    exact = (HeadShard(student_weight, 0, vocab), HeadShard(teacher_weight, 0, vocab))
    hidden = (student_hidden, teacher_hidden)
    columns, seconds = {}, {}

    def read(name: str, own_hidden: Hidden, heads: Heads, rough_heads: Heads | None = None) -> None:
        synchronize(device)
        started = time.perf_counter()
        statistics = token_statistics(*own_hidden, tokens, *heads, rough_heads=rough_heads, k=config.support_k)
        synchronize(device)
        seconds[name] = round(time.perf_counter() - started, 2)
        columns[name] = columns_of(statistics, config)

    # One copy of the heads at a time.
    read("model", hidden, exact)
    read("bf16", *in_bf16(hidden, exact))
    rough = (Fp8Head.of(exact[0]), Fp8Head.of(exact[1]))
    read("fp8-1", hidden, rough)
    read("fp8-2", hidden, exact, rough)
    reference = columns.pop("model")
    return {
        "positions": rows,
        "kept": int(reference["keep"].sum()),
        "heads": {name: agreement(reference, other) for name, other in columns.items()},
        "seconds": seconds,
    }


def in_bf16(hidden: Hidden, heads: Heads) -> tuple[Hidden, Heads]:
    """Rows and heads."""
    student, teacher = (HeadShard(head.weight.bfloat16(), 0, head.vocab_size) for head in heads)
    return (hidden[0].bfloat16(), hidden[1].bfloat16()), (student, teacher)


def synchronize(device: torch.device) -> None:
    """A GPU works on while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Print a table a kind of head, and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--keep-ratio", type=float, default=0.05)
    parser.add_argument("--kinds", nargs="+", choices=SPREADS, default=list(SPREADS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="such as cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = SelectionConfig(keep_ratio=args.keep_ratio)
    found = {}
    for kind in args.kinds:
        found[kind] = compare(kind, args.rows, args.vocab, args.hidden, config, args.seed, args.device)
        print(f"\n{kind}: {args.rows} rows, {found[kind]['kept']} kept, V {args.vocab}, H {args.hidden}")
        print(comparison_table(found[kind]))
        print(f"seconds on {args.device}: {found[kind]['seconds']}", flush=True)
    if args.out is not None:
        args.out.write_text(
            json.dumps(
                {"arguments": vars(args) | {"out": str(args.out), "device": str(args.device)}, **found}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
