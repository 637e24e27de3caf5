"""The Triton kernel behind :mod:`megatron_taopd.ops.triton_statistics`; importing this needs Triton.

Shapes: R rows of one program, W columns of one step, K slots. All arithmetic is fp32. A candidate is one int64 key: in
the upper half the value's bits made to sort as the value does, in the lower half 2^32 - 1 - id, so that of equal values
the lower id has the higher key, as in ``ops.candidates``.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOW_32 = tl.constexpr((1 << 32) - 1)
_TAKEN = tl.constexpr((1 << 63) - 1)
"""Key of slots past K, which are never the lowest."""


@triton.jit
def _key_of(value, low):
    """``low`` is int64 in [0, 2^32)."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | low


@triton.jit
def _value_of(key):
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _insert(key_RK, logits_RW, best_R, place_R, first_id, WIDTH: tl.constexpr):
    """Put into the slots what of these columns is better than the worst slot: one round a better id, at most K.

    Ids ascend from step to step, so that an equal value never displaces one that is there.
    """
    column_W = tl.arange(0, WIDTH)
    worst_R = tl.min(key_RK, 1)
    better_R = best_R > _value_of(worst_R)
    while tl.max(better_R.to(tl.int32), 0) > 0:
        new_R = _key_of(best_R, _LOW_32 - (first_id + place_R).to(tl.int64))
        goes_RK = better_R[:, None] & (key_RK == worst_R[:, None])
        key_RK = tl.where(goes_RK, new_R[:, None], key_RK)
        logits_RW = tl.where(column_W[None, :] == place_R[:, None], float("-inf"), logits_RW)
        best_R, place_R = tl.max(logits_RW, 1, return_indices=True)
        worst_R = tl.min(key_RK, 1)
        better_R = best_R > _value_of(worst_R)
    return key_RK


@triton.jit
def _store_candidates(
    key_RK, other_ptr, values_ptr, ids_ptr, others_ptr, row_R, there_R, stride, first_id,
    absent_id: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Logit, id and the other model's logit of each slot, in no order; -inf, ``absent_id`` and 0 in empty ones."""
    slot_K = tl.arange(0, SLOTS)
    low_RK = key_RK & _LOW_32
    found_RK = low_RK >= SLOTS
    id_RK = tl.where(found_RK, _LOW_32 - low_RK, absent_id)
    stored_RK = there_R[:, None] & (slot_K < K)[None, :]
    read_RK = stored_RK & found_RK
    from_RK = row_R.to(tl.int64)[:, None] * stride + tl.where(read_RK, id_RK - first_id, 0)
    other_RK = tl.load(other_ptr + from_RK, mask=read_RK, other=0.0).to(tl.float32)
    to_RK = row_R[:, None] * K + slot_K[None, :]
    tl.store(values_ptr + to_RK, _value_of(key_RK), mask=stored_RK)
    tl.store(ids_ptr + to_RK, id_RK, mask=stored_RK)
    tl.store(others_ptr + to_RK, other_RK, mask=stored_RK)


@triton.jit
def tile_statistics_kernel(
    student_ptr, teacher_ptr, sums_ptr, values_ptr, ids_ptr, others_ptr, num_rows, width, stride, first_id,
    far_below: tl.constexpr, absent_id: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Everything of ``ROWS`` rows of a tile in one pass over its columns.

    Args:
        student_ptr: logits of ``num_rows`` rows, ``stride`` apart, of which ``width`` columns are real.
        teacher_ptr: the same.
        sums_ptr: fp32 [8, num_rows]: both maxima, and against them both sums of e = exp(z - max), of e (z - max), and
            of e times the difference of both models' distances from their maxima.
        values_ptr: fp32 [2, num_rows, K], ids_ptr int64, others_ptr fp32: candidates of student and teacher.
        first_id: id of the first column.
        SLOTS: K rounded up to a power of two.
    """
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there_R = row_R < num_rows
    start_R = row_R.to(tl.int64) * stride
    slot_K = tl.arange(0, SLOTS)
    # Empty slots hold -inf and their own number, which is below the lower half of every id's key.
    nothing_R = tl.full([ROWS], float("-inf"), tl.float32)
    empty_RK = _key_of(nothing_R[:, None], slot_K.to(tl.int64)[None, :])
    key_s_RK = tl.where((slot_K < K)[None, :], empty_RK, _TAKEN)
    key_t_RK = key_s_RK
    max_s_R = tl.full([ROWS], far_below, tl.float32)
    max_t_R = max_s_R
    mass_s_R = tl.zeros([ROWS], tl.float32)
    mass_t_R, dot_s_R, dot_t_R, gap_s_R, gap_t_R = mass_s_R, mass_s_R, mass_s_R, mass_s_R, mass_s_R

    for first in range(0, width, COLUMNS):
        column_W = first + tl.arange(0, COLUMNS)
        there_RW = there_R[:, None] & (column_W < width)[None, :]
        from_RW = start_R[:, None] + column_W[None, :]
        student_RW = tl.load(student_ptr + from_RW, mask=there_RW, other=float("-inf")).to(tl.float32)
        teacher_RW = tl.load(teacher_ptr + from_RW, mask=there_RW, other=float("-inf")).to(tl.float32)
        best_s_R, place_s_R = tl.max(student_RW, 1, return_indices=True)
        best_t_R, place_t_R = tl.max(teacher_RW, 1, return_indices=True)

        # What was summed against the old maxima is carried over to the new ones.
        new_s_R, new_t_R = tl.maximum(max_s_R, best_s_R), tl.maximum(max_t_R, best_t_R)
        lower_s_R, lower_t_R = max_s_R - new_s_R, max_t_R - new_t_R
        scale_s_R, scale_t_R = tl.exp(lower_s_R), tl.exp(lower_t_R)
        nearer_R = (max_s_R - max_t_R) - (new_s_R - new_t_R)
        max_s_R, max_t_R = new_s_R, new_t_R
        shifted_s_RW = tl.where(there_RW, student_RW - max_s_R[:, None], 0.0)
        shifted_t_RW = tl.where(there_RW, teacher_RW - max_t_R[:, None], 0.0)
        e_s_RW = tl.where(there_RW, tl.exp(shifted_s_RW), 0.0)
        e_t_RW = tl.where(there_RW, tl.exp(shifted_t_RW), 0.0)
        between_RW = shifted_s_RW - shifted_t_RW
        gap_s_R = scale_s_R * (gap_s_R + nearer_R * mass_s_R) + tl.sum(e_s_RW * between_RW, 1)
        gap_t_R = scale_t_R * (gap_t_R + nearer_R * mass_t_R) + tl.sum(e_t_RW * between_RW, 1)
        dot_s_R = scale_s_R * (dot_s_R + lower_s_R * mass_s_R) + tl.sum(e_s_RW * shifted_s_RW, 1)
        dot_t_R = scale_t_R * (dot_t_R + lower_t_R * mass_t_R) + tl.sum(e_t_RW * shifted_t_RW, 1)
        mass_s_R = scale_s_R * mass_s_R + tl.sum(e_s_RW, 1)
        mass_t_R = scale_t_R * mass_t_R + tl.sum(e_t_RW, 1)

        key_s_RK = _insert(key_s_RK, student_RW, best_s_R, place_s_R, first_id + first, COLUMNS)
        key_t_RK = _insert(key_t_RK, teacher_RW, best_t_R, place_t_R, first_id + first, COLUMNS)

    tl.store(sums_ptr + row_R, max_s_R, mask=there_R)
    tl.store(sums_ptr + num_rows + row_R, max_t_R, mask=there_R)
    tl.store(sums_ptr + 2 * num_rows + row_R, mass_s_R, mask=there_R)
    tl.store(sums_ptr + 3 * num_rows + row_R, mass_t_R, mask=there_R)
    tl.store(sums_ptr + 4 * num_rows + row_R, dot_s_R, mask=there_R)
    tl.store(sums_ptr + 5 * num_rows + row_R, dot_t_R, mask=there_R)
    tl.store(sums_ptr + 6 * num_rows + row_R, gap_s_R, mask=there_R)
    tl.store(sums_ptr + 7 * num_rows + row_R, gap_t_R, mask=there_R)
    _store_candidates(
        key_s_RK, teacher_ptr, values_ptr, ids_ptr, others_ptr, row_R, there_R, stride, first_id, absent_id, K, SLOTS
    )
    of_teacher = num_rows * K
    _store_candidates(
        key_t_RK, student_ptr, values_ptr + of_teacher, ids_ptr + of_teacher, others_ptr + of_teacher, row_R, there_R,
        stride, first_id, absent_id, K, SLOTS
    )  # fmt: skip
