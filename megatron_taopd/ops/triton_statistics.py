"""Softmax sums and top-K candidates of a tile of both models' logits in one pass, through Triton.

The same quantities as the torch passes of ``teachability.reading``, so that what combines tiles and ranks is one code.
Checked in Triton's interpreter and compiled for sm80, sm90 and sm100; run on one H200 (docs/gpu.md).
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, NamedTuple

import torch

from megatron_taopd.errors import ConfigError
from megatron_taopd.ops.candidates import ABSENT_ID
from megatron_taopd.ops.tiles import FAR_BELOW

StatisticsKernel = Literal["torch", "triton"]

MAX_SUPPORT_K = 128
"""Slots that a program keeps in registers."""
_COLUMNS = 4096
_INTERPRETED_VALUES = 2**18


class TileStatistics(NamedTuple):
    """Of R rows; index 0 of the lists is the student's, 1 the teacher's."""

    sums_8R: torch.Tensor
    """float64: both maxima, sums of e = exp(z - max), of e (z - max), and of e (student's z - teacher's z)."""
    own_2RK: torch.Tensor
    """fp32 logits of each model's K best ids, in no order; -inf in slots that no id fills."""
    ids_2RK: torch.Tensor
    """int64; ``ABSENT_ID`` in empty slots."""
    other_2RK: torch.Tensor
    """The other model's logits at these ids."""


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors, which is for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_statistics_kernel(
    kernel: StatisticsKernel, *, k: int, device_type: str, dtype: torch.dtype = torch.float32
) -> None:
    """Refuse what the kernel cannot do.

    Args:
        device_type: where the heads are.
        dtype: of their weights.

    Raises:
        ConfigError: Triton or a CUDA device is missing, K is too large, or weights are float64.
    """
    if kernel == "torch":
        return
    flag, instead = f"--statistics-kernel {kernel}", "use --statistics-kernel torch"
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f"{flag} needs the package triton, which is not installed: pip install triton, or {instead}")
    if device_type != "cuda" and not is_interpreted():
        raise ConfigError(
            f"{flag} needs a CUDA device and the models are on {device_type!r}; {instead} (TRITON_INTERPRET=1 runs the "
            "kernel in Triton's interpreter, slowly, for tests)"
        )
    if k > MAX_SUPPORT_K:
        raise ConfigError(
            f"{flag} holds at most {MAX_SUPPORT_K} ids a row and --support-k is {k}; lower it or {instead}"
        )
    if dtype == torch.float64:
        raise ConfigError(f"{flag} computes in fp32 and the weights are float64; {instead}")


def tile_statistics(
    student_RW: torch.Tensor, teacher_RW: torch.Tensor, *, width: int, k: int, first_id: int
) -> TileStatistics:
    """All of a tile's statistics.

    Args:
        student_RW: fp32 or bf16 logits; columns contiguous.
        teacher_RW: of the same shape, strides and type.
        width: columns that are real ids; those after it are not read.
        k: candidates a row.
        first_id: id of the first column.
    """
    from megatron_taopd.ops.triton_kernels import tile_statistics_kernel

    num_rows = student_RW.shape[0]
    assert student_RW.stride() == teacher_RW.stride() and student_RW.stride(1) == 1, "tiles must be laid out alike"
    device = student_RW.device
    sums_8R = torch.empty(8, num_rows, dtype=torch.float32, device=device)
    own_2RK = torch.empty(2, num_rows, k, dtype=torch.float32, device=device)
    ids_2RK = torch.empty(2, num_rows, k, dtype=torch.int64, device=device)
    other_2RK = torch.empty_like(own_2RK)
    rows, columns = _rows_and_columns(num_rows, width)
    tile_statistics_kernel[(-(-num_rows // rows),)](
        student_RW,
        teacher_RW,
        sums_8R,
        own_2RK,
        ids_2RK,
        other_2RK,
        num_rows,
        width,
        student_RW.stride(0),
        first_id,
        far_below=FAR_BELOW,
        absent_id=ABSENT_ID,
        K=k,
        SLOTS=_power_of_two(k),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=8,
    )
    sums_8R = sums_8R.double()
    # The kernel takes differences against that of the maxima, which keeps them small.
    sums_8R[6:] += sums_8R[2:4] * (sums_8R[0] - sums_8R[1]).float()
    return TileStatistics(sums_8R, own_2RK, ids_2RK, other_2RK)


def _rows_and_columns(num_rows: int, width: int) -> tuple[int, int]:
    """Of a program's step: one row, which fills a GPU, or many in the interpreter, where a program costs most."""
    columns = min(_COLUMNS, max(_power_of_two(width), 16))
    if not is_interpreted():
        return 1, columns
    return min(_power_of_two(num_rows), max(_INTERPRETED_VALUES // columns, 1)), columns


def _power_of_two(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()
