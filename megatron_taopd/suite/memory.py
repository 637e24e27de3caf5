"""The most memory that a run took, on a process that makes many runs."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_taopd.platform import device, has_cuda


class PeakMemory:
    """Device memory that torch allocated, or, without a GPU, resident memory of the process: libraries and all."""

    def __init__(self) -> None:
        self.known = True
        if has_cuda():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel starts its high-water mark anew
        except OSError:
            self.known = False

    def read(self) -> int | None:
        """Bytes, of the rank that took most; None where the kernel does not tell. All ranks call it."""
        number = -1
        if self.known:
            number = torch.cuda.max_memory_allocated() if has_cuda() else _high_water_mark()
        peak = torch.tensor([number], dtype=torch.int64, device=device())
        torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
        return None if int(peak) < 0 else int(peak)


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return -1
