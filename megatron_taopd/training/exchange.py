"""Micro-batches on their way to a teacher that is cut in another way, and its hidden states on their way back.

An owner is a data-parallel replica of the student, a reader one of the teacher. B samples, L tokens of a whole
sequence (or of several packed ones), S those of one context-parallel rank, R rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.ops.collectives import all_gather
from megatron_taopd.ops.context import context_positions
from megatron_taopd.platform import device, distributed
from megatron_taopd.platform.layouts import SecondLayout


@dataclass(kw_only=True)
class Job:
    """A micro-batch of an owner as a whole, known to all ranks; in host memory."""

    owner: int
    tokens_BL: torch.Tensor
    ends: list[int]
    """Where packed sequences end, from 0 to L; empty if not packed."""
    rows: list[torch.Tensor]
    """For each context-parallel rank of the owner the rows of hidden states [L * B, H] that it wants."""


def gather_jobs(micro_batches: Sequence[MicroBatch]) -> list[Job]:
    """The micro-batches of all owners, owner by owner; all ranks call it, in the student's layout."""
    context_size = distributed.context_parallel_size()
    place = (distributed.data_parallel_rank(), distributed.context_parallel_rank())
    mine = [_as_numbers(micro_batch) for micro_batch in micro_batches]
    everyone = _gather_numbers(torch.cat([torch.tensor(place, device=device()), *mine]), distributed.row_group())
    parts: dict[tuple[int, int], list[_Part]] = {}
    for numbers in everyone:
        owner, context_rank = numbers[:2].tolist()
        parts[owner, context_rank] = list(_parts(numbers[2:]))
    jobs = []
    for owner in range(distributed.data_parallel_size()):
        of_ranks = [parts[owner, context_rank] for context_rank in range(context_size)]
        jobs += [_whole(owner, same) for same in zip(*of_ranks, strict=True)]
    return jobs


@dataclass(kw_only=True)
class _Part:
    """What a context-parallel rank has of a micro-batch."""

    tokens_BS: torch.Tensor
    ends: list[int]
    rows_R: torch.Tensor


def _as_numbers(micro_batch: MicroBatch) -> torch.Tensor:
    ends = micro_batch.packed_ends
    ends = micro_batch.row_index_R.new_empty(0) if ends is None else ends.long()
    sizes = [*micro_batch.tokens_BS.shape, ends.numel(), micro_batch.row_index_R.numel()]
    header = torch.tensor(sizes, device=ends.device)
    return torch.cat([header, micro_batch.tokens_BS.flatten(), ends, micro_batch.row_index_R])


def _parts(numbers: torch.Tensor) -> Iterator[_Part]:
    start = 0
    while start < numbers.numel():
        batch, length, num_ends, num_rows = numbers[start : start + 4].tolist()
        stop = start + 4 + batch * length + num_ends + num_rows
        tokens, ends, rows = numbers[start + 4 : stop].split([batch * length, num_ends, num_rows])
        yield _Part(tokens_BS=tokens.view(batch, length), ends=ends.tolist(), rows_R=rows)
        start = stop


def _gather_numbers(mine: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Vectors of different lengths, from all ranks of the group, in host memory."""
    lengths = all_gather(torch.tensor([mine.numel()], device=mine.device), group).flatten().tolist()
    padded = mine.new_zeros(max(lengths))
    padded[: mine.numel()] = mine
    gathered = all_gather(padded, group).cpu()
    return [row[:length] for row, length in zip(gathered, lengths, strict=True)]


def _whole(owner: int, parts: Sequence[_Part]) -> Job:
    """Put together what the context-parallel ranks of an owner have of one micro-batch."""
    size, (batch, length) = len(parts), parts[0].tokens_BS.shape
    whole = Job(
        owner=owner,
        tokens_BL=torch.empty(batch, length * size, dtype=torch.int64),
        ends=parts[0].ends,
        rows=[],
    )
    bounds = whole.ends or [0, length * size]
    for rank, part in enumerate(parts):
        places_S = torch.cat(
            [
                start + context_positions(stop - start, rank=rank, size=size)
                for start, stop in zip(bounds, bounds[1:], strict=False)
            ]
        )
        whole.tokens_BL[:, places_S] = part.tokens_BS
        whole.rows.append(places_S[part.rows_R // batch] * batch + part.rows_R % batch)
    return whole


def deal(count: int, readers: int) -> list[range]:
    """Which of ``count`` jobs each reader reads: contiguous, their numbers differ by one at most."""
    return [range(count * reader // readers, count * (reader + 1) // readers) for reader in range(readers)]


def as_micro_batches(jobs: Sequence[Job], *, length_multiple: int, at_least: int) -> list[MicroBatch]:
    """Jobs padded to one shape, with nothing but what a forward pass needs; rows of all context-parallel ranks in turn.

    Args:
        length_multiple: L is rounded up to a multiple of it.
        at_least: micro-batches; those beyond the jobs are padding without rows.
    """
    batch = max((job.tokens_BL.shape[0] for job in jobs), default=1)
    longest = max((job.tokens_BL.shape[1] for job in jobs), default=1)
    length = -(-longest // length_multiple) * length_multiple
    blank = Job(owner=0, tokens_BL=torch.empty(0, 0, dtype=torch.int64), ends=[], rows=[])
    blanks = [blank] * (at_least - len(jobs))
    return [_padded(job, batch, length) for job in [*jobs, *blanks]]


def _padded(job: Job, batch: int, length: int) -> MicroBatch:
    own_batch, own_length = job.tokens_BL.shape
    tokens_BL = torch.zeros(batch, length, dtype=torch.int64)
    tokens_BL[:own_batch, :own_length] = job.tokens_BL
    positions_L = torch.arange(length)
    ends = job.ends
    if ends:
        if ends[-1] < length:  # what is padded is a sequence of its own
            ends = [*ends, length]
        starts = torch.tensor(ends[:-1])
        positions_L = positions_L - starts.repeat_interleave(torch.tensor(ends).diff())
    nothing = torch.empty(0, dtype=torch.int64, device=device())
    rows_R = torch.cat([nothing.cpu(), *job.rows])
    return MicroBatch(
        tokens_BS=tokens_BL.to(device()),
        position_ids_BS=positions_L.repeat(batch, 1).to(device()),
        row_index_R=(rows_R // max(own_batch, 1) * batch + rows_R % max(own_batch, 1)).to(device()),
        token_ids_R=nothing,
        sample_index_R=nothing,
        position_R=nothing,
        rollout_logprobs_R=None,
        packed_ends=torch.tensor(ends, dtype=torch.int32, device=device()) if ends else None,
    )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank is in both layouts."""

    owner: int
    context_rank: int
    wants_rows: bool
    """Last stage of the student."""
    reader: int
    has_rows: bool
    """Last stage of the teacher."""


class Routes:
    """Who sends a micro-batch's rows to whom."""

    def __init__(self, layout: SecondLayout) -> None:
        """All ranks call it, in the student's layout.

        Args:
            layout: the teacher's.
        """
        self.layout = layout
        with layout.in_force():
            reader, has_rows = distributed.data_parallel_rank(), distributed.is_last_stage()
            self.readers = distributed.data_parallel_size()
        self.mine = Place(
            owner=distributed.data_parallel_rank(),
            context_rank=distributed.context_parallel_rank(),
            wants_rows=distributed.is_last_stage(),
            reader=reader,
            has_rows=has_rows,
        )
        self.places: list[Place] = [self.mine] * distributed.world_size()
        dist.all_gather_object(self.places, self.mine)
        self.senders: dict[int, list[int]] = {}
        self.receivers: dict[int, list[int]] = {}
        for rank, place in enumerate(self.places):
            if place.has_rows:
                self.senders.setdefault(place.reader, []).append(rank)
            if place.wants_rows:
                self.receivers.setdefault(place.owner, []).append(rank)

    def between(self, reader: int, owner: int) -> Iterator[tuple[int, int]]:
        """Source and destination of each copy: a rank's own rows where it has them, else the senders take turns."""
        senders = self.senders[reader]
        for turn, rank in enumerate(self.receivers[owner]):
            yield rank if rank in senders else senders[turn % len(senders)], rank

    def deliver(
        self,
        jobs: Mapping[int, tuple[Job, int]],
        rows: Mapping[int, torch.Tensor],
        *,
        hidden_size: int,
        dtype: torch.dtype,
    ) -> dict[int, torch.Tensor]:
        """Carry the rows of some jobs to the ranks that want them; all ranks call it with the same jobs.

        Args:
            jobs: by number, in one order on all ranks: the job and its reader.
            rows: [R, H] by number, of all context-parallel ranks in turn; on the ranks of a reader's last stage.

        Returns:
            [R, H] by number, this context-parallel rank's; on the ranks of an owner's last stage.
        """
        me = distributed.rank()
        received: dict[int, torch.Tensor] = {}
        transfers: list[tuple[Callable[..., Any], torch.Tensor, int]] = []
        for number, (job, reader) in jobs.items():
            counts = [part.numel() for part in job.rows]
            for source, destination in self.between(reader, job.owner):
                wanted = self.places[destination].context_rank
                if me == source:
                    part = rows[number].split(counts)[wanted]
                    if me == destination:
                        # Not a view: it would keep the other ranks' rows alive.
                        received[number] = part if len(counts) == 1 else part.clone()
                    else:
                        transfers.append((dist.isend, part.contiguous(), destination))
                elif me == destination:
                    received[number] = torch.empty(counts[wanted], hidden_size, dtype=dtype, device=device())
                    transfers.append((dist.irecv, received[number], source))
        # Both ends leave out what has no rows, and go through the rest in one order.
        pending = [dist.P2POp(how, tensor, peer) for how, tensor, peer in transfers if tensor.numel()]
        for work in dist.batch_isend_irecv(pending) if pending else ():
            work.wait()
        return received
