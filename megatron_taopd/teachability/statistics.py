"""Token statistics of student and teacher at every row, from final hidden states and both LM heads.

Shapes: R rows, H hidden size (each model its own), K support, U = 2K union slots. The [rows, vocabulary]
matrix never exists: ``teachability.reading`` goes through it in tiles, with one all-gather a chunk of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch

from megatron_taopd.errors import ConfigError, DataError
from megatron_taopd.ops.head import DEFAULT_LOGITS_CHUNK_BYTES, HeadShard
from megatron_taopd.ops.tiles import TilePlan
from megatron_taopd.ops.triton_statistics import StatisticsKernel
from megatron_taopd.ops.vocab import check_support_size
from megatron_taopd.teachability.reading import LogitReader, Reading, bytes_per_row
from megatron_taopd.teachability.two_stage import TwoStageReader, rough_candidates

__all__ = [
    "Support",
    "SupportMode",
    "TokenStatistics",
    "bytes_per_row",
    "check_token_ids",
    "concat_statistics",
    "statistics_by_support",
    "token_statistics",
]

SupportMode = Literal["exact", "upstream"]

Support = tuple[int, SupportMode]
"""K and the mode in which D and C are taken."""

UPSTREAM_MISSING = 1e-12
"""What the released code takes for a probability that is missing from a model's own top-K list."""


@dataclass(kw_only=True)
class TokenStatistics:
    """Per-row numbers [R], the same on every tensor-parallel rank. Logs are natural; p_s, p_t are the real
    distributions over the common vocabulary at the one temperature; S, T their top-K supports, U = S ∪ T."""

    D: torch.Tensor
    """KL(p_t ‖ p_s) on U, both renormalised there (nats). In upstream mode from the two lists alone."""
    C: torch.Tensor
    """Teacher mass on S, in [0, 1]. In upstream mode the lower bound ``C_topk``."""
    C_topk: torch.Tensor
    """Teacher mass on S ∩ T: all that two top-K lists can tell of C."""
    H: torch.Tensor
    """Student entropy over the vocabulary (nats)."""
    H_topk: torch.Tensor
    """Student entropy renormalised on S, divided by log K (0 for K = 1)."""
    kl_forward: torch.Tensor
    """KL(p_t ‖ p_s) over the vocabulary (nats)."""
    kl_reverse: torch.Tensor
    """KL(p_s ‖ p_t) over the vocabulary (nats)."""
    student_logprob: torch.Tensor
    """log p_s of the response token."""
    teacher_logprob: torch.Tensor
    """log p_t of the response token."""
    teacher_entropy: torch.Tensor
    """Teacher entropy over the vocabulary (nats)."""
    overlap: torch.Tensor
    """|S ∩ T| / K."""
    student_mass: torch.Tensor
    """Student mass on S."""
    teacher_mass: torch.Tensor
    """Teacher mass on T."""
    teacher_top1_in_student: torch.Tensor
    """bool: the teacher's best id is in S."""
    rank_in_student: torch.Tensor
    """int64: place of the response token in S from 0, K if absent."""
    rank_in_teacher: torch.Tensor
    """int64: place of the response token in T from 0, K if absent."""

    def __len__(self) -> int:
        return self.D.numel()


def concat_statistics(parts: Sequence[TokenStatistics]) -> TokenStatistics:
    """Rows of all parts, in order; at least one part."""
    return TokenStatistics(
        **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TokenStatistics)}
    )


@torch.no_grad()
def token_statistics(
    student_hidden_RH: torch.Tensor,
    teacher_hidden_RH: torch.Tensor,
    token_ids_R: torch.Tensor,
    student_head: HeadShard,
    teacher_head: HeadShard,
    *,
    k: int = 16,
    temperature: float = 1.0,
    support_mode: SupportMode = "exact",
    logits_chunk_bytes: int = DEFAULT_LOGITS_CHUNK_BYTES,
    compiled: bool = False,
    kernel: StatisticsKernel = "torch",
    rough_heads: tuple[HeadShard, HeadShard] | None = None,
) -> TokenStatistics:
    """Statistics of every row (arXiv 2605.26844), without gradient. All ranks of the heads' group call it.

    Args:
        student_hidden_RH: final hidden states that predict the response tokens, the same on every rank.
        teacher_hidden_RH: the teacher's, of its own width.
        token_ids_R: int64 response tokens.
        student_head: this rank's shard; its vocabulary is the one common to both models.
        teacher_head: the same ids of the teacher.
        k: size of the top-K supports.
        temperature: divides the logits of both models.
        support_mode: ``exact``, or ``upstream`` for D and C as the released code sees them.
        logits_chunk_bytes: memory for one tile of one model's fp32 logits: two exist at once (five on GPUs).
        compiled: run the elementwise passes as one torch.compile loop.
        kernel: ``triton`` makes one pass over a tile of what are several in torch.
        rough_heads: shards of student and teacher in FP8 (:class:`Fp8Head`): the whole vocabulary is read by these, and
            the candidates again by the exact ones (``two_stage``).

    Raises:
        ConfigError: K is larger than the vocabulary, the temperature is not positive, ``compiled`` without a compiler,
            or ``kernel`` without what it needs.
        DataError: a response token is outside the common vocabulary.
    """
    by_support = statistics_by_support(
        student_hidden_RH,
        teacher_hidden_RH,
        token_ids_R,
        student_head,
        teacher_head,
        supports=[(k, support_mode)],
        temperature=temperature,
        logits_chunk_bytes=logits_chunk_bytes,
        compiled=compiled,
        kernel=kernel,
        rough_heads=rough_heads,
    )
    return by_support[k, support_mode]


@torch.no_grad()
def statistics_by_support(
    student_hidden_RH: torch.Tensor,
    teacher_hidden_RH: torch.Tensor,
    token_ids_R: torch.Tensor,
    student_head: HeadShard,
    teacher_head: HeadShard,
    *,
    supports: Sequence[Support],
    temperature: float = 1.0,
    logits_chunk_bytes: int = DEFAULT_LOGITS_CHUNK_BYTES,
    compiled: bool = False,
    kernel: StatisticsKernel = "torch",
    rough_heads: tuple[HeadShard, HeadShard] | None = None,
) -> dict[Support, TokenStatistics]:
    """:func:`token_statistics` for several K and modes from one pass over the logits: smaller supports are the first
    ids of the largest.

    Args:
        supports: pairs of K and mode, at least one.
    """
    student_head.check_lines_up_with(teacher_head)
    for k, _ in supports:
        check_support_size(k, student_head.vocab_size)
    if not temperature > 0:
        raise ConfigError(f"temperature {temperature} must be positive: logits are divided by it")
    check_token_ids(token_ids_R, student_head.vocab_size)
    num_rows = token_ids_R.numel()
    plan = TilePlan.within(logits_chunk_bytes, num_rows=num_rows, num_ids=student_head.weight.shape[0])
    widest = max(k for k, _ in supports)
    candidates = widest if rough_heads is None else rough_candidates(widest, student_head.vocab_size)
    first = LogitReader(
        *(rough_heads or (student_head, teacher_head)),
        plan,
        k=candidates,
        temperature=temperature,
        compiled=compiled,
        kernel=kernel,
    )
    reader = first if rough_heads is None else TwoStageReader(first, student_head, teacher_head, k=widest)
    parts: dict[Support, list[TokenStatistics]] = {support: [] for support in supports}
    for rows in plan.row_slices(num_rows):
        reading = reader.read(student_hidden_RH[rows], teacher_hidden_RH[rows], token_ids_R[rows])
        for k, mode in parts:
            parts[k, mode].append(_to_statistics(reading.narrowed(k), token_ids_R[rows], mode, reader.dtype))
    return {support: concat_statistics(chunks) for support, chunks in parts.items()}


def check_token_ids(token_ids_R: torch.Tensor, vocab_size: int) -> None:
    """Raises:
    DataError: an id is outside the vocabulary common to student and teacher.
    """
    outside = ((token_ids_R < 0) | (token_ids_R >= vocab_size)).nonzero()
    if outside.numel():
        row = int(outside[0])
        raise DataError(
            f"response token id {int(token_ids_R[row])} (row {row}) is outside the {vocab_size} ids common "
            "to student and teacher, which cannot both score it; drop that response"
        )


def _to_statistics(
    x: Reading, token_ids_R: torch.Tensor, support_mode: SupportMode, dtype: torch.dtype
) -> TokenStatistics:
    k = x.ids_s_RK.shape[-1]
    in_both_RK = (x.ids_s_RK[:, :, None] == x.ids_t_RK[:, None, :]).any(-1)
    t_in_s_RK = (x.ids_t_RK[:, :, None] == x.ids_s_RK[:, None, :]).any(-1)
    logp_t_on_s, logp_s_on_t = x.logp_t_on_s, x.logp_s_on_t
    c_topk = logp_t_on_s.exp().where(in_both_RK, 0.0).sum(-1)
    if support_mode == "exact":
        c = logp_t_on_s.exp().sum(-1)
    else:
        c = c_topk
        missing = math.log(UPSTREAM_MISSING)
        logp_t_on_s = logp_t_on_s.where(in_both_RK, missing)
        logp_s_on_t = logp_s_on_t.where(t_in_s_RK, missing)
    rank_s, rank_t = (_rank_of(token_ids_R, ids) for ids in (x.ids_s_RK, x.ids_t_RK))
    values = {
        "D": _union_kl(
            torch.cat([logp_t_on_s, x.logp_t_on_t], -1),
            torch.cat([x.logp_s_on_s, logp_s_on_t], -1),
            torch.cat([torch.ones_like(in_both_RK), ~t_in_s_RK], -1),
        ),
        "C": c.clamp(max=1.0),
        "C_topk": c_topk.clamp(max=1.0),
        "H": x.h_s,
        "H_topk": _renormalised_entropy(x.logp_s_on_s) / math.log(k) if k > 1 else torch.zeros_like(x.h_s),
        "kl_forward": x.kl_forward.clamp(min=0.0),
        "kl_reverse": x.kl_reverse.clamp(min=0.0),
        "student_logprob": x.token_s,
        "teacher_logprob": x.token_t,
        "teacher_entropy": x.h_t,
        "overlap": in_both_RK.double().mean(-1),
        "student_mass": x.logp_s_on_s.exp().sum(-1).clamp(max=1.0),
        "teacher_mass": x.logp_t_on_t.exp().sum(-1).clamp(max=1.0),
    }
    return TokenStatistics(
        **{name: value.to(dtype) for name, value in values.items()},
        teacher_top1_in_student=t_in_s_RK[:, 0],
        rank_in_student=rank_s,
        rank_in_teacher=rank_t,
    )


def _union_kl(log_t_RU: torch.Tensor, log_s_RU: torch.Tensor, counted_RU: torch.Tensor) -> torch.Tensor:
    """KL(t ‖ s) over the counted slots, each side renormalised there; all in log space."""
    log_t_RU, log_s_RU = (x.where(counted_RU, -torch.inf).log_softmax(-1) for x in (log_t_RU, log_s_RU))
    # Rounding alone can bring a sum that is 0 below it.
    return (log_t_RU.exp() * (log_t_RU - log_s_RU)).where(counted_RU, 0.0).sum(-1).clamp(min=0.0)


def _renormalised_entropy(log_p_RK: torch.Tensor) -> torch.Tensor:
    log_q = log_p_RK.log_softmax(-1)
    return -(log_q.exp() * log_q).sum(-1)


def _rank_of(token_ids_R: torch.Tensor, ids_RK: torch.Tensor) -> torch.Tensor:
    """Column of the token among the row's ids, K if it is not there."""
    found = ids_RK == token_ids_R[:, None]
    return found.int().argmax(-1).where(found.any(-1), ids_RK.shape[-1])
