"""One pass over the logits of both models: top-K candidates and softmax sums of each row.

Shapes: R rows of a chunk, W ids of a tile, K support, P ranks. Tiles of logits [R, W] come and go; what stays
is per row. Each model's list of candidates carries the other model's logit at the same ids, and the softmax
sums are taken against this rank's own maximum, so that nothing has to be known of the other ranks before the
end: one all-gather a chunk completes everything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_taopd.ops.candidates import ABSENT_ID, block_maxima, find_candidates, order_best_first, padded_width
from megatron_taopd.ops.collectives import Group, all_gather
from megatron_taopd.ops.head import HeadShard
from megatron_taopd.ops.tiles import FAR_BELOW, TilePlan, row_blocks, rows_of_block
from megatron_taopd.ops.triton_statistics import StatisticsKernel, check_statistics_kernel, tile_statistics
from megatron_taopd.teachability.softmax_sums import (
    NUM_SUMS,
    CompiledSoftmaxSums,
    PlainSoftmaxSums,
    SoftmaxSums,
    combine_sums,
)


class Candidates(NamedTuple):
    """A model's best ids of each row, best first; [R, K]."""

    own: torch.Tensor
    """Its logits; -inf in slots that no id fills."""
    ids: torch.Tensor
    """int64."""
    other: torch.Tensor
    """The other model's logits at these ids."""


class Merged(NamedTuple):
    """What is known of each row when all ranks are put together, the same on all of them."""

    of_s: Candidates
    of_t: Candidates
    sums_8R: torch.Tensor
    """float64; see :mod:`softmax_sums`."""
    token_R2: torch.Tensor
    """float64; logits of the response token in student and teacher."""


class Reading(NamedTuple):
    """What both models say of each row, the same on all ranks; float64 [R] or [R, K], ids best first."""

    ids_s_RK: torch.Tensor
    ids_t_RK: torch.Tensor
    logp_s_on_s: torch.Tensor
    logp_t_on_t: torch.Tensor
    logp_t_on_s: torch.Tensor
    logp_s_on_t: torch.Tensor
    token_s: torch.Tensor
    token_t: torch.Tensor
    h_s: torch.Tensor
    h_t: torch.Tensor
    kl_reverse: torch.Tensor
    kl_forward: torch.Tensor

    def narrowed(self, k: int) -> Reading:
        """The same with the k best ids of either model alone."""
        return Reading(*(column[:, :k] if column.ndim == 2 else column for column in self))


def bytes_per_row(k: int, ranks: int) -> int:
    """Bytes that a rank receives a row: from every other rank both candidate lists and the sums, in fp32."""
    return (ranks - 1) * 4 * _words(k)


def _words(k: int) -> int:
    """Candidates (logit, id, the other's logit) and, a model, maximum, three sums and the token's logit."""
    return 2 * (3 * k + 5)


class LogitReader:
    """Reads chunks of rows through buffers that are made once."""

    def __init__(
        self,
        student_head: HeadShard,
        teacher_head: HeadShard,
        plan: TilePlan,
        *,
        k: int,
        temperature: float,
        compiled: bool = False,
        kernel: StatisticsKernel = "torch",
    ) -> None:
        self.heads = (student_head, teacher_head)
        self.plan = plan
        self.k = k
        self.temperature = temperature
        self.num_ids = student_head.num_valid
        self.vocab_start = student_head.vocab_start
        self.group: Group = student_head.group
        self.kernel = kernel
        weight = student_head.weight
        check_statistics_kernel(kernel, k=k, device_type=weight.device.type, dtype=weight.dtype)
        self.dtype = student_head.logits_dtype
        width = padded_width(min(plan.width, max(self.num_ids, 1)))

        def buffer(rows: int) -> torch.Tensor:
            return torch.empty(rows * width, dtype=self.dtype, device=weight.device)

        self.tiles = (buffer(plan.rows), buffer(plan.rows))
        if compiled:
            self.softmax_sums: SoftmaxSums = CompiledSoftmaxSums()
        elif kernel == "torch":
            block = rows_of_block(plan.rows, width, weight.device)
            self.softmax_sums = PlainSoftmaxSums((buffer(block), buffer(block), buffer(block)))

    def read(
        self, student_hidden_RH: torch.Tensor, teacher_hidden_RH: torch.Tensor, token_ids_R: torch.Tensor
    ) -> Reading:
        """All of it for up to ``plan.rows`` rows. All ranks of the heads' group call it."""
        return to_reading(self.merge(student_hidden_RH, teacher_hidden_RH, token_ids_R))

    def merge(
        self, student_hidden_RH: torch.Tensor, teacher_hidden_RH: torch.Tensor, token_ids_R: torch.Tensor
    ) -> Merged:
        """Candidates and sums of up to ``plan.rows`` rows over the whole vocabulary."""
        hidden = (student_hidden_RH, teacher_hidden_RH)
        num_rows = token_ids_R.numel()
        token_R2 = torch.zeros(num_rows, 2, dtype=self.dtype, device=token_ids_R.device)
        lists = [self._no_candidates(num_rows, token_ids_R.device) for _ in hidden]
        sums: list[torch.Tensor] = [self._no_sums(num_rows, token_ids_R.device)]
        for columns in self.plan.column_slices(self.num_ids if num_rows else 0):
            student_RW, teacher_RW = (
                self._tile(head, hidden_RH, buffer, columns)
                for head, hidden_RH, buffer in zip(self.heads, hidden, self.tiles, strict=True)
            )
            first_id, width = self.vocab_start + columns.start, columns.stop - columns.start
            if self.kernel == "triton":
                self._read_tile_at_once(student_RW, teacher_RW, width, first_id, sums, lists)
            else:
                maxima = self._read_tile(student_RW, teacher_RW, width, sums)
                lists[0] = self._better(lists[0], student_RW, teacher_RW, maxima[0], first_id)
                lists[1] = self._better(lists[1], teacher_RW, student_RW, maxima[1], first_id)
            index_R = token_ids_R - first_id
            here_R = (index_R >= 0) & (index_R < width)
            place_R1 = index_R.where(here_R, 0)[:, None]
            for side, tile_RW in enumerate((student_RW, teacher_RW)):
                token_R2[:, side] += tile_RW.gather(-1, place_R1)[:, 0].where(here_R, 0.0)
        return self._merge_ranks(lists, combine_sums(torch.stack(sums)), token_R2)

    def _tile(self, head: HeadShard, hidden_RH: torch.Tensor, buffer: torch.Tensor, columns: slice) -> torch.Tensor:
        """Logits of these columns, and -inf up to the padded width."""
        width = columns.stop - columns.start
        padded = padded_width(width)
        tile_RW = buffer[: hidden_RH.shape[0] * padded].view(-1, padded)
        head.logits(hidden_RH, self.temperature, columns=columns, out=tile_RW[:, :width])
        tile_RW[:, width:] = -torch.inf
        return tile_RW

    def _read_tile(
        self, student_RW: torch.Tensor, teacher_RW: torch.Tensor, width: int, sums: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the tile's sums to the list; returns the block maxima of both models."""
        maxima: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        sums_of_blocks = []
        for rows in row_blocks(student_RW.shape[0], student_RW.shape[1], student_RW.device):
            tiles = (student_RW[rows], teacher_RW[rows])
            top_R = []
            for tile_RW, of_model in zip(tiles, maxima, strict=True):
                of_model.append(block_maxima(tile_RW))
                top_R.append(of_model[-1].amax(-1))
            student, teacher = (tile_RW[:, :width] for tile_RW in tiles)
            sums_of_blocks.append(self.softmax_sums(student, teacher, top_R[0], top_R[1]))
        sums.append(torch.cat(sums_of_blocks, dim=1))
        return torch.cat(maxima[0]), torch.cat(maxima[1])

    def _read_tile_at_once(
        self,
        student_RW: torch.Tensor,
        teacher_RW: torch.Tensor,
        width: int,
        first_id: int,
        sums: list[torch.Tensor],
        lists: list[Candidates],
    ) -> None:
        """The same as :meth:`_read_tile` and :meth:`_better` of both models, by the Triton kernel."""
        tile = tile_statistics(student_RW, teacher_RW, width=width, k=self.k, first_id=first_id)
        sums.append(tile.sums_8R)
        for side in range(2):
            found = Candidates(tile.own_2RK[side], tile.ids_2RK[side], tile.other_2RK[side])
            lists[side] = best_of([lists[side], found], self.k)

    def _better(
        self,
        known: Candidates,
        own_RW: torch.Tensor,
        other_RW: torch.Tensor,
        block_max_RN: torch.Tensor,
        first_id: int,
    ) -> Candidates:
        """The k best of those known and this tile's."""
        place_RC, counts_RC = find_candidates(own_RW, block_max_RN, self.k, known.own[:, -1])
        found = Candidates(
            own_RW.gather(-1, place_RC).where(counts_RC, -torch.inf),
            (place_RC + first_id).where(counts_RC, ABSENT_ID),
            other_RW.gather(-1, place_RC),
        )
        return best_of([known, found], self.k)

    def _merge_ranks(self, lists: list[Candidates], sums_8R: torch.Tensor, token_R2: torch.Tensor) -> Merged:
        """One all-gather."""
        k = self.k
        columns = [*pack_candidates(lists[0]), *pack_candidates(lists[1]), sums_8R.t().to(self.dtype), token_R2]
        gathered_PRC = all_gather(torch.cat(columns, dim=-1), self.group)
        packed_s, packed_t, sums_PR8, token_PR2 = gathered_PRC.split([3 * k, 3 * k, NUM_SUMS, 2], dim=-1)
        of_s, of_t = (best_of(unpack_candidates(packed, k), k) for packed in (packed_s, packed_t))
        sums_8R = combine_sums(sums_PR8.transpose(1, 2))
        return Merged(of_s=of_s, of_t=of_t, sums_8R=sums_8R, token_R2=token_PR2.double().sum(0))

    def _no_candidates(self, num_rows: int, device: torch.device) -> Candidates:
        own = torch.full((num_rows, self.k), -torch.inf, dtype=self.dtype, device=device)
        return Candidates(own, torch.full_like(own, ABSENT_ID, dtype=torch.int64), torch.zeros_like(own))

    def _no_sums(self, num_rows: int, device: torch.device) -> torch.Tensor:
        sums = torch.zeros(NUM_SUMS, num_rows, dtype=torch.float64, device=device)
        sums[:2] = FAR_BELOW
        return sums


def to_reading(merged: Merged) -> Reading:
    """Logits and sums as log-probabilities, entropies and divergences."""
    of_s, of_t = merged.of_s, merged.of_t
    max_s, max_t, mass_s, mass_t, dot_s, dot_t, gap_s, gap_t = merged.sums_8R.unbind(0)
    lse_s, lse_t = max_s + mass_s.log(), max_t + mass_t.log()
    token_s, token_t = merged.token_R2.double().unbind(-1)
    # log p_s - log p_t is a difference of logits less that of the normalisers: near exact where the models agree.
    return Reading(
        ids_s_RK=of_s.ids,
        ids_t_RK=of_t.ids,
        logp_s_on_s=of_s.own.double() - lse_s[:, None],
        logp_t_on_t=of_t.own.double() - lse_t[:, None],
        logp_t_on_s=of_s.other.double() - lse_t[:, None],
        logp_s_on_t=of_t.other.double() - lse_s[:, None],
        token_s=token_s - lse_s,
        token_t=token_t - lse_t,
        h_s=mass_s.log() - dot_s / mass_s,
        h_t=mass_t.log() - dot_t / mass_t,
        kl_reverse=gap_s / mass_s - (lse_s - lse_t),
        kl_forward=(lse_s - lse_t) - gap_t / mass_t,
    )


def best_of(lists: list[Candidates], k: int) -> Candidates:
    """The k best of all lists' candidates."""
    own, ids, other = (torch.cat(column, dim=-1) for column in zip(*lists, strict=True))
    order = order_best_first(own, ids, k)
    return Candidates(own.gather(-1, order), ids.gather(-1, order), other.gather(-1, order))


def pack_candidates(candidates: Candidates) -> list[torch.Tensor]:
    """Three columns of one float type; the ids as bits, not as numbers."""
    integers = torch.int64 if candidates.own.dtype == torch.float64 else torch.int32
    return [candidates.own, candidates.ids.to(integers).view(candidates.own.dtype), candidates.other]


def unpack_candidates(packed_PRC: torch.Tensor, k: int) -> list[Candidates]:
    """A list a rank from :func:`pack_candidates` of each."""
    integers = torch.int64 if packed_PRC.dtype == torch.float64 else torch.int32
    own, ids, other = packed_PRC.split(k, dim=-1)
    ids = ids.contiguous().view(integers).long()
    return [Candidates(*columns) for columns in zip(own, ids, other, strict=True)]
