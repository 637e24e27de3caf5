"""Micro-batches: shapes, and rows that point at the hidden state before each response token."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_taopd.data.batches import make_micro_batches
from megatron_taopd.data.packing import first_fit, pack_micro_batches, padding_like
from megatron_taopd.data.records import Rollout
from megatron_taopd.errors import DataError

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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("context_size", [1, 2, 3])
def test_every_row_is_on_the_rank_that_computes_its_hidden_state(context_size: int, packed: bool) -> None:
    """Over the context-parallel ranks together each response token is predicted once, at its own position."""
    rng = random.Random(1)

    def ids(longest: int) -> list[int]:
        return [rng.randrange(1, 500) for _ in range(rng.randrange(1, longest))]

    rollouts = [rollout(ids(9), ids(20)) for _ in range(9)]
    seen: list[tuple[int, int]] = []
    for rank in range(context_size):
        layout = {"context_rank": rank, "context_size": context_size, "length_multiple": 2}
        if packed:
            batches = pack_micro_batches(rollouts, max_length=64, sample_offset=3, device=CPU, **layout)
        else:
            batches = make_micro_batches(rollouts, micro_batch_size=4, sample_offset=3, device=CPU, **layout)
        assert len({batch.tokens_BS.shape for batch in batches}) == 1
        for batch in batches:
            lanes, length = batch.tokens_BS.shape
            assert length % 2 == 0 and batch.length == length * context_size and batch.length <= 64
            tokens_SB, positions_SB = batch.tokens_BS.t().reshape(-1), batch.position_ids_BS.t().reshape(-1)
            columns = (batch.row_index_R, batch.token_ids_R, batch.sample_index_R, batch.position_R)
            for row, token, sample, position in zip(*(column.tolist() for column in columns), strict=True):
                source = rollouts[sample - 3]
                sequence = source.prompt_tokens + source.response_tokens
                at = len(source.prompt_tokens) - 1 + position
                assert positions_SB[row] == at and tokens_SB[row] == sequence[at] and token == sequence[at + 1]
                seen.append((sample, position))
            if packed:
                assert lanes == 1 and batch.packed_ends is not None
                ends = batch.packed_ends.tolist()
                assert ends[0] == 0 and ends[-1] == batch.length and ends == sorted(set(ends))
                # Positions begin anew at every end: so do those of this rank's part.
                starts = [start // context_size for start in ends[:-1]]
                chunk = [end - start for start, end in zip(ends, ends[1:], strict=False)]
                first = [rank * (size // (2 * context_size)) if context_size > 1 else 0 for size in chunk]
                assert [int(batch.position_ids_BS[0, start]) for start in starts[:-1]] == first[:-1]
    everything = [(3 + i, p) for i, r in enumerate(rollouts) for p in range(len(r.response_tokens))]
    assert sorted(seen) == everything


def test_packing_by_hand() -> None:
    assert first_fit([5, 9, 3, 4, 1], 9) == [[0, 3], [1], [2, 4]]
    rollouts = [rollout([11, 12], [13], [-1.0]), rollout([21], [22], [-2.0]), rollout([31], [32, 33, 34], [-3.0] * 3)]
    first, second = pack_micro_batches(rollouts, max_length=6, sample_offset=0, device=CPU)
    assert first.tokens_BS.tolist() == [[11, 12, 13, 0, 0, 0]] and first.packed_ends.tolist() == [0, 3, 6]
    assert second.tokens_BS.tolist() == [[21, 22, 31, 32, 33, 34]] and second.packed_ends.tolist() == [0, 2, 6]
    assert second.row_index_R.tolist() == [0, 2, 3, 4] and second.sample_index_R.tolist() == [1, 2, 2, 2]
    assert second.position_R.tolist() == [0, 0, 1, 2]
    assert second.rollout_logprobs_R.tolist() == [-2.0, -3.0, -3.0, -3.0]
    extra = padding_like(first)
    assert extra.tokens_BS.shape == first.tokens_BS.shape and extra.row_index_R.numel() == 0
    assert extra.packed_ends.tolist() == [0, 6]
    with pytest.raises(DataError, match="--max-packed-length 3 .*'x'.* 4 tokens"):
        pack_micro_batches(rollouts, max_length=3, sample_offset=0, device=CPU)
