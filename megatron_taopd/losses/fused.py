"""Losses whose gradient is known in closed form, made in place in the buffers of the logits.

Shapes: R rows, V ids of this rank. ``losses.functions`` has the same losses as plain differentiable functions; these
need two buffers of [R, V] and scratch where autograd needs six, pass over them in blocks of rows that stay in cache,
and make one collective a chunk (``jsd`` two: its sums need the normalisers). A rank sends some float64 a row: 5 for the
KLs, 6 for ``sampled_reverse_kl``, 4 for ``jsd`` and 2 more to its sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch

from megatron_taopd.losses.functions import LossInputs, RowLosses
from megatron_taopd.ops.collectives import all_gather, all_reduce_sum
from megatron_taopd.ops.tiles import FAR_BELOW, row_blocks, rows_of_block


@dataclass(kw_only=True)
class Chunk:
    """The buffers of a chunk and what its gradient is multiplied by."""

    inputs: LossInputs
    """Its logits are overwritten; those of the student with the gradient."""
    grad_scale_R: torch.Tensor | None
    """Factor of each row's gradient; None where none is wanted (the student's buffer then holds nothing of use)."""

    @cached_property
    def scratch(self) -> torch.Tensor:
        """Of the size of a block, which on GPUs is the chunk: made once, for all passes."""
        num_rows, width = self.inputs.student_logits_RV.shape
        device = self.inputs.student_logits_RV.device
        return self.inputs.student_logits_RV.new_empty(rows_of_block(num_rows, width, device), width)

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Rows, both models' logits and a scratch buffer of the same shape, block by block."""
        student_RV, teacher_RV = self.inputs.student_logits_RV, self.inputs.teacher_logits_RV
        for rows in row_blocks(student_RV.shape[0], student_RV.shape[1], student_RV.device):
            yield rows, student_RV[rows], teacher_RV[rows], self.scratch[: rows.stop - rows.start]


FusedLoss = Callable[[Chunk], RowLosses]


class _Normalisers(NamedTuple):
    """float64 [R]; the same on all ranks, but for the scales."""

    lse_s: torch.Tensor
    lse_t: torch.Tensor
    scale_s: torch.Tensor
    """exp(z - this rank's maximum) times this is the student's probability."""
    scale_t: torch.Tensor
    further: tuple[torch.Tensor, ...]
    """What was asked for beside them."""


_Further = Literal["student", "teacher", "sum"]
"""Of a column of this rank: the expectation of x under a model, from sums of exp(z - maximum) times x; or its sum."""


def _maximum(logits_RV: torch.Tensor) -> torch.Tensor:
    if logits_RV.shape[-1] == 0:
        return logits_RV.new_full(logits_RV.shape[:1], FAR_BELOW)
    return logits_RV.amax(-1)


def _normalise(blocks: list[list[torch.Tensor]], chunk: Chunk, *further: _Further) -> _Normalisers:
    """Combine the columns of a chunk over the ranks, by one all-gather.

    Args:
        blocks: of each block of rows both models' maxima, both masses, and a column for each of ``further``.
    """
    if blocks:
        columns_CR = torch.cat([torch.stack(columns).double() for columns in blocks], dim=1)
    else:
        columns_CR = chunk.inputs.student_logits_RV.new_zeros(4 + len(further), 0, dtype=torch.float64)
    parts_PCR = all_gather(columns_CR, chunk.inputs.group)
    maximum_2R = parts_PCR[:, :2].amax(0)
    lower_P2R = (parts_PCR[:, :2] - maximum_2R).exp()
    mass_2R = (lower_P2R * parts_PCR[:, 2:4]).sum(0)
    lse_2R = maximum_2R + mass_2R.log()
    scale_2R = (columns_CR[:2] - lse_2R).exp()
    combined = []
    for kind, parts_PR in zip(further, parts_PCR[:, 4:].unbind(1), strict=True):
        if kind == "sum":
            combined.append(parts_PR.sum(0))
        else:
            side = ("student", "teacher").index(kind)
            combined.append((lower_P2R[:, side] * parts_PR).sum(0) / mass_2R[side])
    return _Normalisers(lse_2R[0], lse_2R[1], scale_2R[0], scale_2R[1], tuple(combined))


def _column(x_R: torch.Tensor, rows: slice, like: torch.Tensor) -> torch.Tensor:
    return x_R[rows, None].to(like.dtype)


def forward_kl(chunk: Chunk) -> RowLosses:
    """KL(p_t ‖ p_s); its gradient is p_s - p_t."""
    columns = []
    for _, student, teacher, gap in chunk.blocks():
        torch.sub(student, teacher, out=gap)
        max_s, max_t = _maximum(student), _maximum(teacher)
        student.sub_(max_s[:, None]).exp_()
        teacher.sub_(max_t[:, None]).exp_()
        columns.append([max_s, max_t, student.sum(-1), teacher.sum(-1), gap.mul_(teacher).sum(-1)])
    n = _normalise(columns, chunk, "teacher")
    (gap_R,) = n.further
    loss_R = (n.lse_s - n.lse_t) - gap_R
    if chunk.grad_scale_R is not None:
        of_student, of_teacher = chunk.grad_scale_R * n.scale_s, chunk.grad_scale_R * n.scale_t
        for rows, student, teacher, _ in chunk.blocks():
            student.mul_(_column(of_student, rows, student))
            student.addcmul_(teacher, _column(of_teacher, rows, student), value=-1)
    return loss_R, {}


def reverse_kl(chunk: Chunk) -> RowLosses:
    """KL(p_s ‖ p_t); its gradient is p_s (log p_s - log p_t - KL)."""
    columns = []
    for _, student, teacher, scratch in chunk.blocks():
        max_s, max_t = _maximum(student), _maximum(teacher)
        mass_t = torch.sub(teacher, max_t[:, None], out=scratch).exp_().sum(-1)
        torch.sub(student, teacher, out=teacher)
        student.sub_(max_s[:, None]).exp_()
        columns.append([max_s, max_t, student.sum(-1), mass_t, torch.mul(student, teacher, out=scratch).sum(-1)])
    n = _normalise(columns, chunk, "student")
    (gap_R,) = n.further
    loss_R = gap_R - (n.lse_s - n.lse_t)
    if chunk.grad_scale_R is not None:
        of_student = chunk.grad_scale_R * n.scale_s
        for rows, student, gap, _ in chunk.blocks():
            gap.sub_(_column(gap_R, rows, gap))  # log p_s - log p_t - KL, as the normalisers cancel
            student.mul_(_column(of_student, rows, student)).mul_(gap)
    return loss_R, {}


def jsd(chunk: Chunk) -> RowLosses:
    """beta KL(p_t ‖ m) + (1 - beta) KL(p_s ‖ m), m = beta p_t + (1 - beta) p_s.

    Its gradient is (1 - beta) p_s (r - E_s[r]) with r = log p_s - log m.
    """
    beta = chunk.inputs.jsd_beta
    if beta in (0, 1):
        return (forward_kl if beta == 0 else reverse_kl)(chunk)
    columns = []
    for _, student, teacher, scratch in chunk.blocks():
        max_s, max_t = _maximum(student), _maximum(teacher)
        mass_s, mass_t = (
            torch.sub(logits, top[:, None], out=scratch).exp_().sum(-1)
            for logits, top in ((student, max_s), (teacher, max_t))
        )
        columns.append([max_s, max_t, mass_s, mass_t])
    n = _normalise(columns, chunk)
    odds, log_own = math.log(beta) - math.log1p(-beta), math.log1p(-beta)
    sums = []
    for rows, student, teacher, p_t in chunk.blocks():
        teacher.sub_(_column(n.lse_t, rows, teacher))
        student.sub_(_column(n.lse_s, rows, student))
        torch.exp(teacher, out=p_t)
        ratio = teacher.sub_(student)  # log p_t - log p_s
        student.exp_()
        of_t = torch.linalg.vecdot(p_t, ratio)
        # log p_s - log m = -log(1 - beta + beta p_t / p_s); log p_t - log m is the log ratio more.
        r = ratio.copy_(torch.nn.functional.softplus(ratio.add_(odds), threshold=50).add_(log_own).neg_())
        of_t += torch.linalg.vecdot(p_t, r)
        sums.append(torch.stack([of_t, torch.linalg.vecdot(student, r)]).double())
    if not sums:
        sums.append(torch.zeros(2, 0, dtype=torch.float64, device=chunk.inputs.student_logits_RV.device))
    of_t, of_s = all_reduce_sum(torch.cat(sums, dim=1), chunk.inputs.group).unbind(0)
    if chunk.grad_scale_R is not None:
        scale_R = (1 - beta) * chunk.grad_scale_R
        for rows, student, r, _ in chunk.blocks():
            student.mul_(_column(scale_R, rows, student)).mul_(r.sub_(_column(of_s, rows, r)))
    return beta * of_t + (1 - beta) * of_s, {}


def sampled_reverse_kl(chunk: Chunk) -> RowLosses:
    """-A r at the sampled token; its gradient is -A r (1[v = y] - p_s), and 0 where the clip holds."""
    x = chunk.inputs
    columns = []
    here_R, place_R = _place(x)
    for rows, student, teacher, scratch in chunk.blocks():
        max_s, max_t = _maximum(student), _maximum(teacher)
        token_s, token_t = (_at(logits, place_R[rows], here_R[rows]) for logits in (student, teacher))
        mass_t = torch.sub(teacher, max_t[:, None], out=scratch).exp_().sum(-1)
        student.sub_(max_s[:, None]).exp_()
        columns.append([max_s, max_t, student.sum(-1), mass_t, token_s, token_t])
    n = _normalise(columns, chunk, "sum", "sum")
    token_s_R, token_t_R = n.further
    old_R = x.old_logprobs_R.double()
    advantage_R = token_t_R - n.lse_t - old_R
    ratio_R = (token_s_R - n.lse_s - old_R).exp()
    unclipped_R = -advantage_R * ratio_R
    loss_R, metrics = unclipped_R, {"importance_ratio": ratio_R}
    slope_R = unclipped_R
    if x.ratio_clip is not None:
        clipped_R = -advantage_R * ratio_R.clamp(1 - x.ratio_clip, 1 + x.ratio_clip)
        holds_R = clipped_R > unclipped_R
        metrics["clipped_share"] = holds_R
        loss_R = clipped_R.where(holds_R, unclipped_R)
        slope_R = slope_R.where(~holds_R, 0.0)
    if chunk.grad_scale_R is not None:
        slope_R = slope_R * chunk.grad_scale_R
        for rows, student, _, _ in chunk.blocks():
            student.mul_(_column(-slope_R * n.scale_s, rows, student))
        row_L = here_R.nonzero()[:, 0]
        x.student_logits_RV[row_L, place_R[row_L]] += slope_R[row_L].to(x.student_logits_RV.dtype)
    return loss_R, metrics


FUSED_LOSSES: dict[str, FusedLoss] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "sampled_reverse_kl": sampled_reverse_kl,
}
"""By the names in :data:`losses.functions.LOSSES`."""


def _place(x: LossInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each row's token is one of this rank's ids, and its column (0 where it is not)."""
    place_R = x.token_ids_R - x.vocab_start
    here_R = (place_R >= 0) & (place_R < x.student_logits_RV.shape[-1])
    return here_R, place_R.where(here_R, 0)


def _at(logits_RV: torch.Tensor, place_R: torch.Tensor, here_R: torch.Tensor) -> torch.Tensor:
    if logits_RV.shape[-1] == 0:
        return logits_RV.new_zeros(logits_RV.shape[:1])
    return logits_RV.gather(-1, place_R[:, None])[:, 0].where(here_R, 0.0)
