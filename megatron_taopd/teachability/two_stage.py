"""Rows read in two stages: candidates and softmax sums from rough logits, then the candidates' logits again, exactly.

The rough product (FP8) goes over the whole vocabulary. Of each model it leaves the 2 K best ids and the softmax sums;
the logits of all these ids, and of the response token, are then computed in both models from their own rows of the
exact heads, and their share of the sums is replaced. What stays rough is the share of all other ids in the
normalisers, entropies and whole-vocabulary divergences; D has no part in it.

Shapes: R rows, K support, P = 4 K + 1 chosen ids of a row, some of them twice.
"""

from __future__ import annotations

import torch

from megatron_taopd.ops.candidates import ABSENT_ID, order_best_first
from megatron_taopd.ops.collectives import all_reduce_sum
from megatron_taopd.ops.head import HeadShard
from megatron_taopd.teachability.reading import Candidates, LogitReader, Merged, Reading, to_reading
from megatron_taopd.teachability.softmax_sums import combine_sums

CANDIDATES_PER_K = 2
"""Rough candidates for each id of a support: what is in the exact top K is among the rough top 2 K."""


def rough_candidates(k: int, vocab_size: int) -> int:
    """How many of a model's rough best are computed again."""
    return min(CANDIDATES_PER_K * k, vocab_size)


class TwoStageReader:
    """Corrects what a reader of rough heads has read by the exact heads of the same ids."""

    def __init__(self, rough: LogitReader, student_head: HeadShard, teacher_head: HeadShard, *, k: int) -> None:
        """Take a reader of the rough heads.

        Args:
            rough: with :func:`rough_candidates` as its k.
            k: size of the supports that come out.
        """
        self.rough = rough
        self.heads = (student_head, teacher_head)
        self.k = k
        self.dtype = student_head.logits_dtype

    def read(
        self, student_hidden_RH: torch.Tensor, teacher_hidden_RH: torch.Tensor, token_ids_R: torch.Tensor
    ) -> Reading:
        """As :meth:`LogitReader.read`: one all-reduce a chunk more."""
        rough = self.rough.merge(student_hidden_RH, teacher_hidden_RH, token_ids_R)
        ids_RP = torch.cat([rough.of_s.ids, rough.of_t.ids, token_ids_R[:, None]], dim=-1)
        rough_2RP = torch.stack(
            [
                torch.cat([rough.of_s.own, rough.of_t.other, rough.token_R2[:, :1]], dim=-1),
                torch.cat([rough.of_s.other, rough.of_t.own, rough.token_R2[:, 1:]], dim=-1),
            ]
        )
        counted_RP = first_of_each(ids_RP) & (ids_RP != ABSENT_ID)
        exact_2RP = self._exact_logits((student_hidden_RH, teacher_hidden_RH), ids_RP, counted_RP)
        sums_8R = replace_in_sums(rough.sums_8R, rough_2RP, exact_2RP, counted_RP)
        of_s, of_t = (
            self._best(exact_2RP[side], exact_2RP[1 - side], ids_RP, counted_RP) for side in range(len(self.heads))
        )
        last_R1 = torch.full_like(token_ids_R, ids_RP.shape[1] - 1)[:, None]
        place_R1 = first_place(ids_RP).gather(-1, last_R1)
        token_R2 = torch.cat([side_RP.gather(-1, place_R1) for side_RP in exact_2RP], dim=-1)
        return to_reading(Merged(of_s=of_s, of_t=of_t, sums_8R=sums_8R, token_R2=token_R2))

    def _exact_logits(
        self, hidden: tuple[torch.Tensor, torch.Tensor], ids_RP: torch.Tensor, counted_RP: torch.Tensor
    ) -> torch.Tensor:
        """Both models' logits [2, R, P] at the counted ids, 0 at the others, the same on all ranks."""
        local = [
            head.logits_at(hidden_RH, ids_RP, counted_RP, self.rough.temperature)
            for head, hidden_RH in zip(self.heads, hidden, strict=True)
        ]
        return all_reduce_sum(torch.stack([side_RP.to(self.dtype) for side_RP in local]), self.rough.group)

    def _best(
        self, own_RP: torch.Tensor, other_RP: torch.Tensor, ids_RP: torch.Tensor, counted_RP: torch.Tensor
    ) -> Candidates:
        """The k best of the counted ids by this model's exact logits."""
        own_RP, ids_RP = own_RP.where(counted_RP, -torch.inf), ids_RP.where(counted_RP, ABSENT_ID)
        order_RK = order_best_first(own_RP, ids_RP, self.k)
        return Candidates(*(column.gather(-1, order_RK) for column in (own_RP, ids_RP, other_RP)))


def first_place(ids_RP: torch.Tensor) -> torch.Tensor:
    """Column [R, P] where each id stands for the first time in its row."""
    return (ids_RP[:, :, None] == ids_RP[:, None, :]).int().argmax(-1)


def first_of_each(ids_RP: torch.Tensor) -> torch.Tensor:
    """bool [R, P]: no column before it has the same id."""
    return first_place(ids_RP) == torch.arange(ids_RP.shape[1], device=ids_RP.device)


def replace_in_sums(
    sums_8R: torch.Tensor, rough_2RP: torch.Tensor, exact_2RP: torch.Tensor, counted_RP: torch.Tensor
) -> torch.Tensor:
    """The softmax sums [8, R] with the exact logits of some ids in the place of the rough ones.

    Nothing is exponentiated above a row's maximum. Where the ids hold nearly all of the mass, the rest is a difference
    of nearly equal numbers: it is then as good as the sums' own rounding, which is what it weighs in the result.

    Args:
        sums_8R: float64, over the whole vocabulary, from rough logits.
        rough_2RP: both models' rough logits, of which the sums were made.
        exact_2RP: the exact ones.
        counted_RP: the columns that stand for an id.
    """
    maxima_2R = sums_8R[:2]
    rest_8R = sums_8R - _sums_of(rough_2RP.double(), counted_RP, maxima_2R)
    rest_8R[:2] = maxima_2R
    rest_8R[2:4].clamp_(min=0.0)
    rest_8R[4:6].clamp_(max=0.0)
    exact_2RP = exact_2RP.double()
    exact_maxima_2R = exact_2RP.where(counted_RP, -torch.inf).amax(-1)
    return combine_sums(torch.stack([rest_8R, _sums_of(exact_2RP, counted_RP, exact_maxima_2R)]))


def _sums_of(logits_2RP: torch.Tensor, counted_RP: torch.Tensor, maxima_2R: torch.Tensor) -> torch.Tensor:
    """The eight sums over the counted columns against these maxima."""
    shifted_2RP = (logits_2RP - maxima_2R[..., None]).where(counted_RP, 0.0)
    mass_2RP = shifted_2RP.exp().where(counted_RP, 0.0)
    gap_RP = (logits_2RP[0] - logits_2RP[1]).where(counted_RP, 0.0)
    per_model = [mass_2RP.sum(-1), (mass_2RP * shifted_2RP).sum(-1), (mass_2RP * gap_RP).sum(-1)]
    return torch.cat([maxima_2R, *per_model])
