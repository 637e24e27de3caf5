"""Responses as micro-batches, with the rows of hidden states that predict their tokens.

A micro-batch holds its sequences side by side, padded to one length, or packed end to end in one long sequence. Of each
sequence a context-parallel rank has its own part (:func:`ops.context.context_positions`), and of its rows those whose
hidden state it computes: a row carries the token that it predicts, so chunk borders need no care.

B samples of a micro-batch (1 if packed), S length of this rank's part, C context-parallel ranks, R response tokens of
a micro-batch that this rank predicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_taopd.data.records import Rollout
from megatron_taopd.ops.context import context_positions
from megatron_taopd.platform import device as default_device

_PADDING_ID = 0


@dataclass(kw_only=True)
class MicroBatch:
    """Prompts and responses of some samples, padded on the right.

    Rows are ordered by sample, then by position in the response.
    """

    tokens_BS: torch.Tensor
    """int64; prompt, response, padding."""
    position_ids_BS: torch.Tensor
    """int64; position in its sequence of each token."""
    row_index_R: torch.Tensor
    """int64; row of hidden states [S, B, H] flattened to [S*B, H] that predicts each response token."""
    token_ids_R: torch.Tensor
    """int64; the response tokens."""
    sample_index_R: torch.Tensor
    """int64; index of the response in the global batch."""
    position_R: torch.Tensor
    """int64; position in the response, from 0."""
    rollout_logprobs_R: torch.Tensor | None
    """float32; log-probabilities recorded at sampling, None where they were not."""
    student_hidden_RH: torch.Tensor | None = None
    """The student's final hidden states that predicted the response tokens, where the rollouts kept them."""
    context_size: int = 1
    """C."""
    teacher: int = 0
    """Which of several teachers reads it."""
    packed_ends: torch.Tensor | None = None
    """int32 [sequences + 1], from 0 to ``length``: where packed sequences end, padding included; None: not packed."""

    @property
    def length(self) -> int:
        """Tokens along the sequence over all context-parallel ranks: C * S."""
        return self.tokens_BS.shape[1] * self.context_size


@dataclass(frozen=True, kw_only=True)
class PlacedResponse:
    """A response and the tokens that it gets in a micro-batch; these count all context-parallel ranks."""

    rollout: Rollout
    sample_index: int
    lane: int
    """Its place along B."""
    start: int
    """Its first token along the sequence; a multiple of 2 C."""
    length: int
    """Tokens with padding; a multiple of 2 C."""


def context_multiple(context_size: int) -> int:
    """Lengths that context-parallel ranks can cut are multiples of this."""
    return 2 * context_size if context_size > 1 else 1


def sequence_length(rollout: Rollout) -> int:
    """Tokens of prompt and response."""
    return len(rollout.prompt_tokens) + len(rollout.response_tokens)


def make_micro_batches(
    rollouts: Sequence[Rollout],
    *,
    micro_batch_size: int,
    sample_offset: int,
    length_multiple: int = 1,
    context_rank: int = 0,
    context_size: int = 1,
    at_least: int = 0,
    teachers: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> list[MicroBatch]:
    """Cut responses, in order, into padded micro-batches of one shape.

    Where the last micro-batch is not full, samples of padding without rows fill it: pipeline stages expect
    equal shapes.

    Args:
        rollouts: responses of this data-parallel replica, at least one.
        micro_batch_size: samples a micro-batch; fewer if there are not as many responses.
        sample_offset: index of the first response in the global batch.
        length_multiple: S is rounded up to a multiple of it (the tensor-parallel size under sequence
            parallelism).
        context_rank: this rank's part of every sequence.
        context_size: the number of parts.
        at_least: micro-batches; those beyond the responses are padding without rows. Replicas that share experts
            must bring the same number.
        teachers: which teacher reads each response (default: the first); a micro-batch has one.
        device: default: that of this process.
    """
    if not rollouts:
        raise ValueError("no responses to make micro-batches of")
    multiple = length_multiple * context_multiple(context_size)
    length = -(-max(map(sequence_length, rollouts)) // multiple) * multiple
    size = min(micro_batch_size, len(rollouts))
    with_logprobs = all(r.response_logprobs is not None for r in rollouts)
    micro_batches = []
    for teacher, indices in by_teacher(teachers or [0] * len(rollouts)):
        for start in range(0, max(len(indices), at_least * size), size):
            placed = [
                PlacedResponse(rollout=rollouts[i], sample_index=sample_offset + i, lane=lane, start=0, length=length)
                for lane, i in enumerate(indices[start : start + size])
            ]
            micro_batch = place_responses(
                placed,
                lanes=size,
                length=length,
                context_rank=context_rank,
                context_size=context_size,
                with_logprobs=with_logprobs,
                device=device or default_device(),
            )
            micro_batch.teacher = teacher
            micro_batches.append(micro_batch)
    return micro_batches


def by_teacher(teachers: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Each teacher with the indices of its responses, in order."""
    return [(teacher, [i for i, t in enumerate(teachers) if t == teacher]) for teacher in sorted(set(teachers))]


def place_responses(
    placed: Sequence[PlacedResponse],
    *,
    lanes: int,
    length: int,
    context_rank: int,
    context_size: int,
    with_logprobs: bool,
    device: torch.device,
) -> MicroBatch:
    """This context-parallel rank's part of a micro-batch of ``lanes`` sequences, ``length`` tokens each over all ranks.

    Args:
        with_logprobs: the responses have log-probabilities to take along.
    """
    own_S = context_positions(length, rank=context_rank, size=context_size)
    tokens_BS = torch.full((lanes, own_S.numel()), _PADDING_ID, dtype=torch.int64)
    positions_BS = own_S.repeat(lanes, 1)
    row_index, token_ids, sample_index, position, logprobs, hidden = [], [], [], [], [], []
    for place in placed:
        rollout = place.rollout
        own = context_positions(place.length, rank=context_rank, size=context_size)
        first = place.start // context_size
        here = slice(first, first + own.numel())
        sequence = torch.full((place.length,), _PADDING_ID, dtype=torch.int64)
        sequence[: sequence_length(rollout)] = torch.tensor(rollout.prompt_tokens + rollout.response_tokens)
        tokens_BS[place.lane, here] = sequence[own]
        positions_BS[place.lane, here] = own
        # The hidden state at s predicts the token at s + 1.
        response_T = own - (len(rollout.prompt_tokens) - 1)
        predicts = (response_T >= 0) & (response_T < len(rollout.response_tokens))
        response_T = response_T[predicts]
        row_index.append((first + predicts.nonzero()[:, 0]) * lanes + place.lane)
        token_ids.append(torch.tensor(rollout.response_tokens)[response_T])
        sample_index.append(torch.full_like(response_T, place.sample_index))
        position.append(response_T)
        if with_logprobs and rollout.response_logprobs is not None:
            logprobs.append(torch.tensor(rollout.response_logprobs, dtype=torch.float32)[response_T])
        if rollout.hidden_TH is not None:
            rows, tokens = rollout.hidden_TH.shape[0], len(rollout.response_tokens)
            assert rows == tokens, f"kept hidden states have {rows} rows and the responses {tokens} tokens"
            hidden.append(rollout.hidden_TH[response_T.to(rollout.hidden_TH.device)])
    assert len(hidden) in (0, len(placed)), "some responses kept their hidden states and some did not"

    def joined(parts: list[torch.Tensor], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.cat([*parts, torch.empty(0, dtype=dtype)]).to(device)

    return MicroBatch(
        tokens_BS=tokens_BS.to(device),
        position_ids_BS=positions_BS.to(device),
        row_index_R=joined(row_index),
        token_ids_R=joined(token_ids),
        sample_index_R=joined(sample_index),
        position_R=joined(position),
        rollout_logprobs_R=joined(logprobs, torch.float32) if with_logprobs else None,
        student_hidden_RH=torch.cat(hidden).to(device) if hidden else None,
        context_size=context_size,
    )
