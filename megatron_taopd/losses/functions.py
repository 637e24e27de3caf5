"""One pure function a loss: this rank's logits in, a loss a row out, differentiable in the student's logits.

Shapes: R rows, V ids of this rank, K support, U ids in use. Results [R] are replicated over the group, and
values cross between sharded and replicated only through ``ops.collectives``, which gives every rank its exact
gradient. All losses are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from megatron_taopd.ops.collectives import Group, all_gather, sum_over_shards
from megatron_taopd.ops.vocab import (
    best_of_ranks,
    check_support_size,
    gather_ids,
    gather_local,
    local_max,
    log_probs,
    log_sum_exp,
    mark_ids,
    pack_best,
)

Support = Literal["student", "teacher", "union"]


@dataclass(kw_only=True)
class LossInputs:
    """What a loss may look at. Logits are divided by the temperature; all but the student's are detached."""

    student_logits_RV: torch.Tensor
    teacher_logits_RV: torch.Tensor
    token_ids_R: torch.Tensor
    """Sampled tokens."""
    old_logprobs_R: torch.Tensor
    """log p_s(y) of the policy that sampled them."""
    vocab_start: int
    vocab_size: int
    group: Group
    k: int = 16
    support: Support = "student"
    jsd_beta: float = 0.5
    ratio_clip: float | None = None


RowLosses = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Loss [R], and detached numbers a row [R] for the log."""

Loss = Callable[[LossInputs], RowLosses]


def reverse_kl(x: LossInputs) -> RowLosses:
    """KL(p_s ‖ p_t) over the vocabulary."""
    log_s, log_t = _both_log_probs(x)
    return sum_over_shards((log_s.exp() * (log_s - log_t)).sum(-1), x.group), {}


def forward_kl(x: LossInputs) -> RowLosses:
    """KL(p_t ‖ p_s) over the vocabulary."""
    log_s, log_t = _both_log_probs(x)
    return sum_over_shards((log_t.exp() * (log_t - log_s)).sum(-1), x.group), {}


def jsd(x: LossInputs) -> RowLosses:
    """beta KL(p_t ‖ m) + (1 - beta) KL(p_s ‖ m) with m = beta p_t + (1 - beta) p_s (GKD, arXiv 2306.13649).

    That is 0 at both ends; beta = 0 stands for the forward KL and 1 for the reverse KL, its limits up to
    scale.
    """
    if x.jsd_beta == 0:
        return forward_kl(x)
    if x.jsd_beta == 1:
        return reverse_kl(x)
    log_s, log_t = _both_log_probs(x)
    log_m = torch.logaddexp(log_t + math.log(x.jsd_beta), log_s + math.log1p(-x.jsd_beta))
    terms = x.jsd_beta * log_t.exp() * (log_t - log_m) + (1 - x.jsd_beta) * log_s.exp() * (log_s - log_m)
    return sum_over_shards(terms.sum(-1), x.group), {}


def topk_reverse_kl(x: LossInputs) -> RowLosses:
    """KL(p_s ‖ p_t) over the support's ids and one bucket with the rest of each model's mass."""
    log_s, log_t, counted = _bucketed_log_probs(x)
    return (log_s.exp() * (log_s - log_t)).where(counted, 0.0).sum(-1), {}


def topk_forward_kl(x: LossInputs) -> RowLosses:
    """KL(p_t ‖ p_s) over the support's ids and one bucket with the rest of each model's mass."""
    log_s, log_t, counted = _bucketed_log_probs(x)
    return (log_t.exp() * (log_t - log_s)).where(counted, 0.0).sum(-1), {}


def sampled_reverse_kl(x: LossInputs) -> RowLosses:
    """-A r with A = log p_t(y) - log p_old(y) and r = p_s(y) / p_old(y): the paper's policy gradient.

    With ``ratio_clip`` c the larger of -A r and -A clip(r, 1 - c, 1 + c), as in PPO.
    """
    ids_R1 = x.token_ids_R[:, None]
    log_s, log_t = (
        gather_ids(logits, ids_R1, vocab_start=x.vocab_start, group=x.group)[:, 0] - log_sum_exp(logits, x.group)
        for logits in (x.student_logits_RV, x.teacher_logits_RV)
    )
    advantage = log_t - x.old_logprobs_R
    ratio = (log_s - x.old_logprobs_R).exp()
    loss = -advantage * ratio
    metrics = {"importance_ratio": ratio.detach()}
    if x.ratio_clip is not None:
        clipped = -advantage * ratio.clamp(1 - x.ratio_clip, 1 + x.ratio_clip)
        metrics["clipped_share"] = (clipped > loss).detach()
        loss = torch.maximum(loss, clipped)
    return loss, metrics


LOSSES: dict[str, Loss] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "topk_reverse_kl": topk_reverse_kl,
    "topk_forward_kl": topk_forward_kl,
    "sampled_reverse_kl": sampled_reverse_kl,
}


def _both_log_probs(x: LossInputs) -> tuple[torch.Tensor, torch.Tensor]:
    return log_probs(x.student_logits_RV, x.group), log_probs(x.teacher_logits_RV, x.group)


class _Supports(NamedTuple):
    """Of each row, the same on all ranks."""

    ids_RU: torch.Tensor
    counted_RU: torch.Tensor
    """An id of both supports counts once."""
    maximum_2R: torch.Tensor
    """Highest logits of student and teacher."""


def _supports(x: LossInputs) -> _Supports:
    """One all-gather: the candidates of each support that is asked for, and the maximum of the other model."""
    check_support_size(x.k, x.vocab_size)
    both, dtype = (x.student_logits_RV, x.teacher_logits_RV), x.student_logits_RV.dtype
    wanted = [x.support in (name, "union") for name in ("student", "teacher")]
    packed = [
        pack_best(logits, x.k, x.vocab_start) if want else local_max(logits)[:, None].double()
        for want, logits in zip(wanted, both, strict=True)
    ]
    parts = all_gather(torch.cat(packed, dim=-1), x.group).split([part.shape[-1] for part in packed], dim=-1)
    ids: list[torch.Tensor] = []
    maxima = []
    for want, part_PRC in zip(wanted, parts, strict=True):
        if want:
            values_RK, ids_RK = best_of_ranks(part_PRC, dtype)
            ids.append(ids_RK)
            maxima.append(values_RK[:, 0])
        else:
            maxima.append(part_PRC[:, :, 0].amax(0).to(dtype))
    counted = [torch.ones_like(ids[0], dtype=torch.bool)]
    if len(ids) == 2:
        counted.append(~(ids[1][:, :, None] == ids[0][:, None, :]).any(-1))
    return _Supports(torch.cat(ids, dim=-1), torch.cat(counted, dim=-1), torch.stack(maxima))


def _bucketed_log_probs(x: LossInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both models over the support's ids and the tail, and which slots count; each [R, U + 1].

    The tail is summed over its own ids: 1 minus the rest would lose it where it is small. Where the support
    is the whole vocabulary the tail has (next to) no mass in either model and adds nothing. One all-gather and one
    sum over the ranks.
    """
    supports = _supports(x)
    inside_RV = mark_ids(supports.ids_RU, vocab_start=x.vocab_start, num_valid=x.student_logits_RV.shape[-1])
    tiny = torch.finfo(x.student_logits_RV.dtype).tiny
    partial = []
    for logits_RV, maximum_R in zip((x.student_logits_RV, x.teacher_logits_RV), supports.maximum_2R, strict=True):
        shifted_RV = logits_RV - maximum_R[:, None]
        mass_RV = shifted_RV.exp()
        of_side = [
            gather_local(shifted_RV, supports.ids_RU, x.vocab_start),
            mass_RV.sum(-1, keepdim=True),
            mass_RV.masked_fill(inside_RV, 0.0).sum(-1, keepdim=True),
        ]
        partial.append(torch.cat(of_side, dim=-1))
    slots = supports.ids_RU.shape[-1]
    sides = []
    for side_RC in sum_over_shards(torch.stack(partial), x.group):
        at_ids_RU, total_R1, tail_R1 = side_RC.split([slots, 1, 1], dim=-1)
        sides.append(torch.cat([at_ids_RU, tail_R1.clamp_min(tiny).log()], dim=-1) - total_R1.log())
    counted_RU = supports.counted_RU
    return sides[0], sides[1], torch.cat([counted_RU, torch.ones_like(counted_RU[:, :1])], dim=-1)
