"""Micro-batches: shapes, and rows that point at the hidden state before each response token."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_taopd.data.batches import make_micro_batches
from megatron_taopd.data.records import Rollout

CPU = torch.device("cpu")


def rollout(prompt: list[int], response: list[int], logprobs: list[float] | None = None) -> Rollout:
    return Rollout(id="x", prompt_tokens=prompt, response_tokens=response, response_logprobs=logprobs)


def test_by_hand() -> None:
    (batch,) = make_micro_batches(
        [rollout([11, 12], [13, 14], [-1.0, -2.0]), rollout([21], [22], [-3.0])],
        micro_batch_size=2,
        sample_offset=6,
        length_multiple=3,
        device=CPU,
    )
    assert batch.tokens_BS.tolist() == [[11, 12, 13, 14, 0, 0], [21, 22, 0, 0, 0, 0]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    # Row s * B + b: positions 1 and 2 of the first sample, 0 of the second.
    assert batch.row_index_R.tolist() == [2, 4, 1]
    assert batch.token_ids_R.tolist() == [13, 14, 22]
    assert batch.sample_index_R.tolist() == [6, 6, 7]
    assert batch.position_R.tolist() == [0, 1, 0]
    assert batch.rollout_logprobs_R is not None and batch.rollout_logprobs_R.tolist() == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 7, 50])
def test_every_row_predicts_its_token(micro_batch_size: int) -> None:
    rng = random.Random(0)

    def ids() -> list[int]:
        return [rng.randrange(1, 500) for _ in range(rng.randrange(1, 9))]

    rollouts = [rollout(ids(), ids()) for _ in range(7)]
    batches = make_micro_batches(
        rollouts, micro_batch_size=micro_batch_size, sample_offset=10, length_multiple=4, device=CPU
    )
    assert len({b.tokens_BS.shape for b in batches}) == 1
    rows, length = batches[0].tokens_BS.shape
    assert rows == min(micro_batch_size, 7) and length % 4 == 0
    longest = max(len(r.prompt_tokens + r.response_tokens) for r in rollouts)
    assert longest <= length < longest + 4
    seen: dict[int, list[int]] = {}
    for batch in batches:
        assert batch.rollout_logprobs_R is None
        # A stand-in for hidden states: element [s, b] is the token that follows.
        following_SB = batch.tokens_BS.roll(-1, dims=1).t()
        assert torch.equal(following_SB.reshape(-1)[batch.row_index_R], batch.token_ids_R)
        for sample, position, token in zip(
            batch.sample_index_R.tolist(), batch.position_R.tolist(), batch.token_ids_R.tolist(), strict=True
        ):
            assert position == len(seen.setdefault(sample, []))
            seen[sample].append(token)
    assert list(seen) == list(range(10, 17))
    assert list(seen.values()) == [r.response_tokens for r in rollouts]


def test_micro_batches_beyond_the_responses_are_padding() -> None:
    first, second, third = make_micro_batches(
        [rollout([11], [13, 14]), rollout([21], [22])], micro_batch_size=2, sample_offset=0, at_least=3, device=CPU
    )
    assert second.tokens_BS.tolist() == third.tokens_BS.tolist() == [[0, 0, 0]] * 2
    assert (first.row_index_R.numel(), second.row_index_R.numel()) == (3, 0)
    assert second.sample_index_R.numel() == second.position_R.numel() == second.token_ids_R.numel() == 0
