"""Statistics, and loss with gradient, on one GPU: each beside the bare bf16 products and, for the loss, dense torch.

    python benchmarks/bench_gpu.py [--rows 8192] [--hidden 2048 4096] [--vocab 151936] [--out FILE.json]

Heads and hidden states are bf16; the head's gradient is added to an fp32 buffer as under Megatron's DDP. Best of the
rounds, synchronised, and the most that tensors held above the inputs. ``--device cpu`` tries the script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_taopd.losses import LossConfig, distillation_loss
from megatron_taopd.ops import HeadShard
from megatron_taopd.ops.fp8 import Fp8Head
from megatron_taopd.teachability import token_statistics

Work = Callable[[], Any]


class Inputs:
    """Random rows and heads of student and teacher, logits spread by 3."""

    def __init__(self, rows: int, student: int, teacher: int, vocab: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def normal(count: int, width: int, scale: float = 1.0) -> torch.Tensor:
            values = torch.empty(count, width, device=device, dtype=torch.bfloat16)
            return values.normal_(generator=generator).mul_(scale)

        self.hidden_s, self.hidden_t = normal(rows, student), normal(rows, teacher)
        self.weight_s, self.weight_t = (
            normal(vocab, student, 3 / student**0.5),
            normal(vocab, teacher, 3 / teacher**0.5),
        )
        self.tokens = torch.randint(0, vocab, (rows,), generator=generator, device=device)
        self.heads = HeadShard(self.weight_s, 0, vocab), HeadShard(self.weight_t, 0, vocab)


def scoring(given: Inputs, chunk_bytes: int, *, fp8: bool) -> Iterator[tuple[str, Work]]:
    """Every position's statistics; the products are bf16 in and out, over all ids of 512 rows at once."""

    def products() -> None:
        for start in range(0, len(given.tokens), 512):
            torch.mm(given.hidden_s[start : start + 512], given.weight_s.t())
            torch.mm(given.hidden_t[start : start + 512], given.weight_t.t())

    def statistics(**chosen: Any) -> Work:
        rows = given.hidden_s, given.hidden_t, given.tokens
        return lambda: token_statistics(*rows, *given.heads, k=16, logits_chunk_bytes=chunk_bytes, **chosen)

    yield "two bf16 products", products
    yield "statistics, torch", statistics()
    if given.tokens.is_cuda:
        yield "statistics, torch.compile", statistics(compiled=True)
        yield "statistics, Triton", statistics(kernel="triton")
    if fp8:
        rough = tuple(Fp8Head.of(head) for head in given.heads)
        yield "statistics, FP8 heads in two stages", statistics(rough_heads=rough)
        if given.tokens.is_cuda:
            yield "statistics, FP8 heads in two stages, Triton", statistics(rough_heads=rough, kernel="triton")


def losses(given: Inputs, chunk_bytes: int) -> Iterator[tuple[str, Work]]:
    """Reverse KL over the whole vocabulary with the gradients of hidden states and head."""
    weight = given.weight_s.clone().requires_grad_()
    rows = len(given.tokens)

    def dense() -> None:
        hidden = given.hidden_s.clone().requires_grad_()
        log_s = (hidden @ weight.t()).float().log_softmax(-1)
        with torch.no_grad():
            log_t = (given.hidden_t @ given.weight_t.t()).float().log_softmax(-1)
        F.kl_div(log_t, log_s, reduction="sum", log_target=True).backward()
        weight.grad = None

    def ours(ratio: float) -> Work:
        own = given.weight_s.clone().requires_grad_()
        own.main_grad = torch.zeros(own.shape, device=own.device)  # type: ignore[attr-defined]
        own.grad_added_to_main_grad = False  # type: ignore[attr-defined]
        head = HeadShard(own, 0, own.shape[0])
        kept = torch.arange(max(1, round(ratio * rows)), device=own.device)

        def run() -> None:
            hidden = given.hidden_s[kept].clone().requires_grad_()
            loss, _ = distillation_loss(
                hidden,
                given.hidden_t[kept],
                given.tokens[kept],
                torch.zeros(len(kept), device=own.device),
                head,
                given.heads[1],
                config=LossConfig(loss="reverse_kl"),
                logits_chunk_bytes=chunk_bytes,
            )
            loss.backward()
            own.grad = None

        return run

    yield "dense torch, fp32 softmax", dense
    for ratio in (1.0, 0.1, 0.05):
        yield f"ours, ρ = {ratio:g}", ours(ratio)


def measure(work: Work, rounds: int, device: torch.device) -> dict[str, float]:
    """Best seconds of the rounds after a warm-up, and the peak above what was there (MiB; 0 on CPU)."""
    seconds = []
    for _ in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        work()
        peak = 0.0
        if device.type == "cuda":
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds[1:]), "peak_mib": peak}


def table(title: str, contenders: Iterator[tuple[str, Work]], rounds: int, device: torch.device) -> list[dict]:
    """Print a row as soon as it is measured; ratios are to the first."""
    print(f"\n{title}\n\n| | ms | ÷ first | peak MiB |\n|---|--:|--:|--:|", flush=True)
    rows: list[dict] = []
    for name, work in contenders:
        try:
            row: dict[str, Any] = {"contender": name, **measure(work, rounds, device)}
        except torch.OutOfMemoryError:
            print(f"| {name} | out of memory | | |", flush=True)
            torch.cuda.empty_cache()
            rows.append({"contender": name, "seconds": None, "peak_mib": None})
            continue
        first = next((other["seconds"] for other in rows if other["seconds"]), row["seconds"])
        row["ratio"] = row["seconds"] / first
        print(f"| {name} | {1e3 * row['seconds']:.1f} | {row['ratio']:.2f} | {row['peak_mib']:.0f} |", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, nargs=2, default=[2048, 4096], help="of student and teacher")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--chunk-mib", type=int, nargs="+", default=[64, 512], help="--logits-chunk-bytes to try")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    shape = f"T {args.rows:,}, H {args.hidden[0]:,}/{args.hidden[1]:,}, V {args.vocab:,}, bf16"
    print(f"{name}, torch {torch.__version__}: {shape}")
    given = Inputs(args.rows, *args.hidden, args.vocab, device)
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "shape": shape}
    for mib in args.chunk_mib:
        for what, made in (
            ("Scoring", scoring(given, mib * 2**20, fp8=True)),
            ("Loss and gradient", losses(given, mib * 2**20)),
        ):
            results[f"{what}, chunks of {mib} MiB"] = table(f"{what}, chunks of {mib} MiB", made, args.rounds, device)
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
