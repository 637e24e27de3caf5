"""Compare the Triton kernel of the statistics with the torch passes on a real GPU, and time both.

    python tools/check_kernels.py [--rows 1024] [--vocab 151936] [--hidden 2048] [--support-k 16]

Prints the largest difference of every statistic, then seconds and peak memory of each. Exit status 1 where they differ
by more than the tolerance. Needs a CUDA device; with TRITON_INTERPRET=1 it compares on CPU and times nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields
from functools import partial

import torch

from megatron_taopd.ops import HeadShard
from megatron_taopd.ops.triton_statistics import check_statistics_kernel, is_interpreted
from megatron_taopd.teachability import TokenStatistics, token_statistics

TOLERANCE = 1e-4


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 1024), ("vocab", 151936), ("hidden", 2048), ("support-k", 16), ("repeats", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_statistics_kernel("triton", k=asked.support_k, device_type=device.type)
    run = partial(statistics, *problem(asked.rows, asked.vocab, asked.hidden, device), k=asked.support_k)

    want, got, differences = run(kernel="torch"), run(kernel="triton"), []
    for field in fields(TokenStatistics):
        a, b = (getattr(result, field.name).double() for result in (want, got))
        difference = float(((a - b).abs() / (1 + a.abs())).max())
        differences.append(difference)
        print(f"{field.name:<24} {difference:.2e}")
    print(f"allowed {TOLERANCE:.0e}")
    if not is_interpreted():
        for kernel in ("torch", "triton"):
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(asked.repeats):
                run(kernel=kernel)
            torch.cuda.synchronize()
            seconds = (time.perf_counter() - start) / asked.repeats
            peak = torch.cuda.max_memory_allocated() / 2**20
            print(f"{kernel:<8} {1000 * seconds:.2f} ms with both products, peak {peak:.0f} MiB")
    # A NaN is within nothing.
    return 0 if all(difference <= TOLERANCE for difference in differences) else 1


def problem(rows: int, vocab: int, hidden: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Hidden states of student and teacher, tokens, and both heads in bf16 on GPUs, fp32 on CPU."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(count: int) -> torch.Tensor:
        return torch.randn(count, hidden, generator=generator, device=device).to(dtype)

    scale = 3 / hidden**0.5
    tokens = torch.randint(0, vocab, (rows,), generator=generator, device=device)
    return normal(rows), normal(rows), tokens, normal(vocab) * scale, normal(vocab) * scale


def statistics(
    student: torch.Tensor,
    teacher: torch.Tensor,
    tokens: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    k: int,
    kernel: str,
) -> TokenStatistics:
    """Of all rows."""
    heads = (HeadShard.for_rank(weight, weight.shape[0], None) for weight in (student_weight, teacher_weight))
    return token_statistics(student, teacher, tokens, *heads, k=k, kernel=kernel)


if __name__ == "__main__":
    sys.exit(main())
