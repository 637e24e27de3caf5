"""Responses as padded micro-batches, with the rows of hidden states that predict their tokens.

B samples of a micro-batch, S padded length, R response tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_taopd.data.records import Rollout
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
    """int64; 0 to S-1 in every sample."""
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


def make_micro_batches(
    rollouts: Sequence[Rollout],
    *,
    micro_batch_size: int,
    sample_offset: int,
    length_multiple: int = 1,
    at_least: int = 0,
    device: torch.device | None = None,
) -> list[MicroBatch]:
    """Cut responses, in order, into micro-batches of one shape.

    Where the last micro-batch is not full, samples of padding without rows fill it: pipeline stages expect
    equal shapes.

    Args:
        rollouts: responses of this data-parallel replica, at least one.
        micro_batch_size: samples a micro-batch; fewer if there are not as many responses.
        sample_offset: index of the first response in the global batch.
        length_multiple: S is rounded up to a multiple of it (the tensor-parallel size under sequence
            parallelism).
        at_least: micro-batches; those beyond the responses are padding without rows. Replicas that share experts
            must bring the same number.
        device: default: that of this process.
    """
    if not rollouts:
        raise ValueError("no responses to make micro-batches of")
    device = device or default_device()
    longest = max(len(r.prompt_tokens) + len(r.response_tokens) for r in rollouts)
    length = -(-longest // length_multiple) * length_multiple
    size = min(micro_batch_size, len(rollouts))
    with_logprobs = all(r.response_logprobs is not None for r in rollouts)
    return [
        _micro_batch(
            rollouts[start : start + size],
            size=size,
            length=length,
            first_index=sample_offset + start,
            with_logprobs=with_logprobs,
            device=device,
        )
        for start in range(0, max(len(rollouts), at_least * size), size)
    ]


def _micro_batch(
    rollouts: Sequence[Rollout],
    *,
    size: int,
    length: int,
    first_index: int,
    with_logprobs: bool,
    device: torch.device,
) -> MicroBatch:
    tokens_BS = torch.full((size, length), _PADDING_ID, dtype=torch.int64)
    row_index: list[int] = []
    token_ids: list[int] = []
    sample_index: list[int] = []
    position: list[int] = []
    logprobs: list[float] = []
    for b, rollout in enumerate(rollouts):
        sequence = rollout.prompt_tokens + rollout.response_tokens
        tokens_BS[b, : len(sequence)] = torch.tensor(sequence)
        num_tokens = len(rollout.response_tokens)
        # The hidden state at s predicts the token at s + 1.
        first = len(rollout.prompt_tokens) - 1
        row_index += [s * size + b for s in range(first, first + num_tokens)]
        token_ids += rollout.response_tokens
        sample_index += [first_index + b] * num_tokens
        position += range(num_tokens)
        if with_logprobs and rollout.response_logprobs is not None:
            logprobs += rollout.response_logprobs

    def ids(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return MicroBatch(
        tokens_BS=tokens_BS.to(device),
        position_ids_BS=torch.arange(length, device=device).expand(size, length).contiguous(),
        row_index_R=ids(row_index),
        token_ids_R=ids(token_ids),
        sample_index_R=ids(sample_index),
        position_R=ids(position),
        rollout_logprobs_R=torch.tensor(logprobs, dtype=torch.float32, device=device) if with_logprobs else None,
        student_hidden_RH=_kept_hidden(rollouts, device),
    )


def _kept_hidden(rollouts: Sequence[Rollout], device: torch.device) -> torch.Tensor | None:
    kept = [r.hidden_TH for r in rollouts if r.hidden_TH is not None]
    if not kept or len(kept) < len(rollouts):
        assert not kept, "some responses kept their hidden states and some did not"
        return None
    rows, tokens = [h.shape[0] for h in kept], [len(r.response_tokens) for r in rollouts]
    assert rows == tokens, f"kept hidden states have {rows} rows and the responses {tokens} tokens"
    return torch.cat(kept).to(device)
