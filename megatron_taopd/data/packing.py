"""Responses packed end to end into long sequences, so that hardly a token is padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_taopd.data.batches import (
    MicroBatch,
    PlacedResponse,
    by_teacher,
    context_multiple,
    place_responses,
    sequence_length,
)
from megatron_taopd.data.records import Rollout
from megatron_taopd.errors import DataError
from megatron_taopd.platform import device as default_device


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` in bins: the longest first, each into the first bin that has room.

    Args:
        capacity: of a bin; at least the longest length.

    Returns:
        Each bin ascending, bins by their first index.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = next((b for b, left in enumerate(room) if lengths[index] <= left), None)
        if fitting is None:
            fitting = len(bins)
            bins.append([])
            room.append(capacity)
        bins[fitting].append(index)
        room[fitting] -= lengths[index]
    return sorted(sorted(indices) for indices in bins)


def pack_micro_batches(
    rollouts: Sequence[Rollout],
    *,
    max_length: int,
    sample_offset: int,
    length_multiple: int = 1,
    context_rank: int = 0,
    context_size: int = 1,
    teachers: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> list[MicroBatch]:
    """Micro-batches of one packed sequence each, all of one length.

    Positions begin anew in every response, and attention does not cross its ends. What is left of a sequence is
    one more packed sequence of padding without rows.

    Args:
        rollouts: responses of this data-parallel replica, at least one.
        max_length: most tokens of a packed sequence, over all context-parallel ranks.
        sample_offset: index of the first response in the global batch.
        length_multiple: this rank's part is a multiple of it, as in :func:`make_micro_batches`.
        context_rank: this rank's part of every response.
        context_size: the number of parts.
        teachers: as in :func:`make_micro_batches`.
        device: default: that of this process.

    Raises:
        DataError: a response does not fit with its prompt.
    """
    step = context_multiple(context_size)
    multiple = step * length_multiple
    lengths = [-(-sequence_length(rollout) // step) * step for rollout in rollouts]
    capacity = max_length // multiple * multiple
    longest = max(range(len(rollouts)), key=lengths.__getitem__)
    if lengths[longest] > capacity:
        raise DataError(
            f"--max-packed-length {max_length} has no room for {rollouts[longest].id!r}: prompt and response "
            f"have {sequence_length(rollouts[longest])} tokens ({lengths[longest]} padded for the layout); raise it"
        )
    bins: list[list[int]] = []
    teacher_of_bin: list[int] = []
    for teacher, own in by_teacher(teachers or [0] * len(rollouts)):
        own_bins = first_fit([lengths[i] for i in own], capacity)
        bins += [[own[i] for i in indices] for indices in own_bins]
        teacher_of_bin += [teacher] * len(own_bins)
    used = max(sum(lengths[i] for i in indices) for indices in bins)
    length = -(-used // multiple) * multiple
    with_logprobs = all(r.response_logprobs is not None for r in rollouts)
    micro_batches = []
    for teacher, indices in zip(teacher_of_bin, bins, strict=True):
        placed, ends = [], [0]
        for i in indices:
            placed.append(
                PlacedResponse(
                    rollout=rollouts[i], sample_index=sample_offset + i, lane=0, start=ends[-1], length=lengths[i]
                )
            )
            ends.append(ends[-1] + lengths[i])
        micro_batch = place_responses(
            placed,
            lanes=1,
            length=length,
            context_rank=context_rank,
            context_size=context_size,
            with_logprobs=with_logprobs,
            device=device or default_device(),
        )
        if ends[-1] < length:
            ends.append(length)
        micro_batch.packed_ends = torch.tensor(ends, dtype=torch.int32, device=micro_batch.tokens_BS.device)
        micro_batch.teacher = teacher
        micro_batches.append(micro_batch)
    return micro_batches


def padding_like(micro_batch: MicroBatch) -> MicroBatch:
    """A micro-batch of the same shape without rows, for schedules that want one more."""
    logprobs, hidden = micro_batch.rollout_logprobs_R, micro_batch.student_hidden_RH
    ends = micro_batch.packed_ends
    return MicroBatch(
        tokens_BS=torch.zeros_like(micro_batch.tokens_BS),
        position_ids_BS=micro_batch.position_ids_BS,
        row_index_R=micro_batch.row_index_R[:0],
        token_ids_R=micro_batch.token_ids_R[:0],
        sample_index_R=micro_batch.sample_index_R[:0],
        position_R=micro_batch.position_R[:0],
        rollout_logprobs_R=None if logprobs is None else logprobs[:0],
        student_hidden_RH=None if hidden is None else hidden[:0],
        context_size=micro_batch.context_size,
        packed_ends=None if ends is None else ends[[0, -1]],
        teacher=micro_batch.teacher,
    )
