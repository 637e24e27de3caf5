"""The same loss and gradient by everyone: KL(p_s ‖ p_t) or KL(p_t ‖ p_s) over the whole vocabulary, summed over rows,
with gradients of the student's hidden states and LM head.

A contender takes the problem and leaves the gradients in its tensors. Shapes: T positions, R rows in use, H hidden
size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from problem import Problem

from megatron_taopd.config import ScoringConfig
from megatron_taopd.losses import LossConfig, distillation_loss
from megatron_taopd.ops import HeadShard
from megatron_taopd.ops.tiles import TilePlan
from megatron_taopd.teachability import SelectionConfig, select, token_statistics

TRAIN_CHUNK_BYTES = ScoringConfig().logits_chunk_bytes
"""What ``taopd train`` uses."""

Contender = Callable[[Problem], torch.Tensor]
"""Loss and gradient; answers the detached loss."""

BETA = {"forward": 0.0, "reverse": 1.0}
"""Ends of the peers' generalised JSD: at 0 KL(p_t ‖ p_s), at 1 KL(p_s ‖ p_t)."""


def heads(problem: Problem) -> tuple[HeadShard, HeadShard]:
    vocab = problem.student_weight_VH.shape[0]
    return HeadShard(problem.student_weight_VH, 0, vocab), HeadShard(problem.teacher_weight_VH, 0, vocab)


def num_kept(tokens: int, ratio: float) -> int:
    return max(1, math.ceil(tokens * ratio))


def given_rows(tokens: int, ratio: float) -> torch.Tensor:
    """Evenly spread rows that a selection might have kept."""
    count = num_kept(tokens, ratio)
    return torch.arange(count) * tokens // count


# --- this project -----------------------------------------------------------------------------------------------------


def ours(ratio: float, kl: str, chunk_bytes: int) -> Contender:
    """The loss on given rows of the hidden states."""

    def run(problem: Problem) -> torch.Tensor:
        rows_R = None if ratio == 1.0 else given_rows(len(problem.token_ids_T), ratio)
        return _our_loss(problem, rows_R, kl, chunk_bytes)

    return run


def ours_with_scoring(ratio: float, kl: str, chunk_bytes: int) -> Contender:
    """Statistics of every row, selection, and the loss on the rows that it keeps."""

    def run(problem: Problem) -> torch.Tensor:
        return _our_loss(problem, selected_rows(problem, ratio, chunk_bytes), kl, chunk_bytes)

    return run


def selected_rows(problem: Problem, ratio: float, chunk_bytes: int) -> torch.Tensor:
    """Rows that the teachability selector keeps, of one response."""
    student, teacher = heads(problem)
    token_ids_T = problem.token_ids_T
    statistics = token_statistics(
        problem.student_hidden_TH.detach(),
        problem.teacher_hidden_TH,
        token_ids_T,
        student,
        teacher,
        logits_chunk_bytes=chunk_bytes,
    )
    selection = select(
        statistics,
        sample_index_R=torch.zeros_like(token_ids_T),
        position_R=torch.arange(len(token_ids_T)),
        config=SelectionConfig(keep_ratio=ratio),
    )
    return selection.keep.nonzero()[:, 0]


def _our_loss(problem: Problem, rows_R: torch.Tensor | None, kl: str, chunk_bytes: int) -> torch.Tensor:
    student, teacher = heads(problem)
    hidden, teacher_hidden = problem.student_hidden_TH, problem.teacher_hidden_TH
    token_ids = problem.token_ids_T
    if rows_R is not None:
        hidden, teacher_hidden, token_ids = hidden[rows_R], teacher_hidden[rows_R], token_ids[rows_R]
    loss, _ = distillation_loss(
        hidden,
        teacher_hidden,
        token_ids,
        torch.zeros(len(token_ids)),
        student,
        teacher,
        config=LossConfig(loss=f"{kl}_kl"),
        logits_chunk_bytes=chunk_bytes,
    )
    loss.backward()
    return loss.detach()


# --- plain torch ------------------------------------------------------------------------------------------------------


def _both_logits(problem: Problem, rows_R: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, teacher_hidden = problem.student_hidden_TH, problem.teacher_hidden_TH
    if rows_R is not None:
        hidden, teacher_hidden = hidden[rows_R], teacher_hidden[rows_R]
    with torch.no_grad():
        teacher_logits_RV = teacher_hidden @ problem.teacher_weight_VH.t()
    return hidden @ problem.student_weight_VH.t(), teacher_logits_RV


def dense_torch(kl: str, rows: Callable[[Problem], torch.Tensor] | None = None) -> Contender:
    """Logits of all rows, two log-softmaxes, F.kl_div, backward."""

    def run(problem: Problem) -> torch.Tensor:
        student_RV, teacher_RV = _both_logits(problem, None if rows is None else rows(problem))
        log_s, log_t = student_RV.log_softmax(-1), teacher_RV.log_softmax(-1)
        of, to = (log_s, log_t) if kl == "reverse" else (log_t, log_s)
        loss = F.kl_div(to, of, reduction="sum", log_target=True)
        loss.backward()
        return loss.detach()

    return run


def chunk_rows(vocab: int, chunk_bytes: int) -> int:
    return max(1, chunk_bytes // (4 * vocab))


def given_slices(count: int, size: int) -> Iterator[slice]:
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def matrix_products(ratio: float, rows_a_chunk: int) -> Contender:
    """The four products that no exact method can avoid, into buffers that are used again; nothing else."""

    def run(problem: Problem) -> torch.Tensor:
        rows = num_kept(len(problem.token_ids_T), ratio)
        weight_s, weight_t = problem.student_weight_VH.detach(), problem.teacher_weight_VH
        hidden_s, hidden_t = problem.student_hidden_TH.detach()[:rows], problem.teacher_hidden_TH[:rows]
        size = min(rows, rows_a_chunk)
        buffers = [torch.empty(size, weight_s.shape[0]) for _ in range(2)]
        grad_hidden, grad_weight = torch.empty_like(hidden_s), torch.zeros_like(weight_s)
        for part in given_slices(rows, size):
            student_RV, teacher_RV = (buffer[: part.stop - part.start] for buffer in buffers)
            torch.mm(hidden_s[part], weight_s.t(), out=student_RV)
            torch.mm(hidden_t[part], weight_t.t(), out=teacher_RV)
            torch.mm(student_RV, weight_s, out=grad_hidden[part])
            grad_weight.addmm_(student_RV.t(), hidden_s[part])
        return grad_hidden.new_zeros(())

    return run


def forward_products(chunk_bytes: int) -> Contender:
    """The two products that scoring of all rows cannot avoid, in the tiles of the statistics; nothing else."""

    def run(problem: Problem) -> torch.Tensor:
        weights = problem.student_weight_VH.detach(), problem.teacher_weight_VH
        hiddens = problem.student_hidden_TH.detach(), problem.teacher_hidden_TH
        num_rows, vocab = len(problem.token_ids_T), weights[0].shape[0]
        plan = TilePlan.within(chunk_bytes, num_rows=num_rows, num_ids=vocab)
        buffers = [torch.empty(plan.rows * plan.width) for _ in weights]
        for rows in plan.row_slices(num_rows):
            for columns in plan.column_slices(vocab):
                shape = rows.stop - rows.start, columns.stop - columns.start
                for hidden_TH, weight_VH, buffer in zip(hiddens, weights, buffers, strict=True):
                    tile_RW = buffer[: shape[0] * shape[1]].view(shape)
                    torch.mm(hidden_TH[rows], weight_VH[columns].t(), out=tile_RW)
        return weights[0].new_zeros(())

    return run


# --- peers: imported where they are made, so that a process that measures another one never loads them ----------------

TRL = ("trl", "datasets")
LIGER = ("liger_kernel", "triton")


def trl_gkd(kl: str) -> Contender:
    """GKDTrainer's loss, called as its ``compute_loss`` does (labels given, divided by a count: here 1)."""
    from trl.experimental.gkd import GKDTrainer

    def run(problem: Problem) -> torch.Tensor:
        student_RV, teacher_RV = _both_logits(problem, None)
        loss = GKDTrainer.generalized_jsd_loss(
            student_RV[None],
            teacher_RV[None],
            labels=problem.token_ids_T[None],
            beta=BETA[kl],
            num_items_in_batch=1,
        )
        loss.backward()
        return loss.detach()

    return run


def trl_chunked(kl: str) -> Contender:
    """The loss of TRL's DistillationTrainer, which never holds whole logits."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def run(problem: Problem) -> torch.Tensor:
        loss, _, _ = _chunked_divergence_loss(
            problem.student_hidden_TH[None],
            problem.teacher_hidden_TH[None],
            problem.student_weight_VH,
            problem.teacher_weight_VH,
            torch.ones_like(problem.token_ids_T)[None],
            BETA[kl],
            num_items_in_batch=1,
        )
        loss.backward()
        return loss.detach()

    return run


def liger(kl: str, *, compiled: bool, rows_a_chunk: int) -> Contender:
    """Liger's chunked, fused JSD at the KL end; it answers a mean, which is scaled to the sum."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def run(problem: Problem) -> torch.Tensor:
        function = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=float(len(problem.token_ids_T)),
            beta=BETA[kl],
            compiled=compiled,
            chunk_size=rows_a_chunk,
        )
        loss = function(
            problem.student_hidden_TH,
            problem.student_weight_VH,
            problem.teacher_hidden_TH,
            problem.teacher_weight_VH,
            problem.token_ids_T,
        )
        loss.backward()
        return loss.detach()

    return run
