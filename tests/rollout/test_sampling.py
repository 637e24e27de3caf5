"""A token is drawn by inverting the cumulative distribution with numbers that depend on counters alone."""

from __future__ import annotations

import pytest
import torch

from megatron_taopd.rollout.sampling import choose_tokens, sampling_numbers
from megatron_taopd.teachability.hashing import uniform_hash

PROBS = torch.tensor([0.1, 0.4, 0.0, 0.2, 0.3])
LOGITS = torch.cat([PROBS.log(), torch.tensor([50.0, 50.0])])  # two ids of padding


def shares(temperature: float, top_p: float | None = None, n: int = 20_000) -> torch.Tensor:
    numbers = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, _ = choose_tokens(LOGITS.expand(n, -1), numbers, vocab_size=5, temperature=temperature, top_p=top_p)
    return torch.bincount(tokens, minlength=7) / n


@pytest.mark.parametrize(
    ("temperature", "top_p", "weights"),
    [
        (1.0, None, [0.1, 0.4, 0.0, 0.2, 0.3]),
        (1.0, 1.0, [0.1, 0.4, 0.0, 0.2, 0.3]),
        (0.5, None, [0.01, 0.16, 0.0, 0.04, 0.09]),
        (2.0, None, [0.1**0.5, 0.4**0.5, 0.0, 0.2**0.5, 0.3**0.5]),
        (1.0, 0.65, [0.0, 0.4, 0.0, 0.0, 0.3]),  # 0.4 is not enough, 0.7 is
        (1.0, 0.75, [0.0, 0.4, 0.0, 0.2, 0.3]),
        (1.0, 0.01, [0.0, 1.0, 0.0, 0.0, 0.0]),
        (0.5, 0.8, [0.0, 0.16, 0.0, 0.0, 0.09]),  # of the tempered distribution
        (0.0, None, [0.0, 1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_shares(temperature: float, top_p: float | None, weights: list[float]) -> None:
    wanted = torch.tensor([*weights, 0.0, 0.0])
    torch.testing.assert_close(shares(temperature, top_p), wanted / wanted.sum(), atol=2e-4, rtol=0)


def test_logprobs_are_of_the_whole_real_vocabulary() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 300) * 3
    numbers = torch.rand(64, dtype=torch.float64)
    for temperature, top_p in ((1.0, None), (0.7, None), (1.3, 0.5), (0.0, None)):
        tokens, logprobs = choose_tokens(logits, numbers, vocab_size=257, temperature=temperature, top_p=top_p)
        wanted = (logits[:, :257].double() / (temperature or 1.0)).log_softmax(-1)
        torch.testing.assert_close(logprobs, wanted.gather(1, tokens[:, None])[:, 0].float())
        assert logprobs.dtype == torch.float32 and int(tokens.max()) < 257


def test_edges() -> None:
    # The largest number below 1 and zero never choose a token of probability 0.
    numbers = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).repeat(2, 1)
    for top_p in (None, 0.99):
        tokens, _ = choose_tokens(logits, numbers, vocab_size=4, temperature=1.0, top_p=top_p)
        assert set(tokens.tolist()) == {1, 2}
    # Among equals: greedy takes the lower id, nucleus fills from it.
    equal = torch.zeros(2, 8)
    assert choose_tokens(equal, numbers, vocab_size=8, temperature=0.0)[0].tolist() == [0, 0]
    assert choose_tokens(equal, numbers, vocab_size=8, temperature=1.0, top_p=0.2)[0].tolist() == [0, 1]
    # What is not finite shows in the log-probabilities and breaks nothing.
    tokens, logprobs = choose_tokens(torch.full((2, 8), torch.nan), numbers, vocab_size=8, temperature=1.0)
    assert bool(logprobs.isnan().all()) and int(tokens.min()) >= 0 and int(tokens.max()) < 8


def test_half_precision_logits_are_read_in_float32() -> None:
    logits = (torch.arange(512.0) / 97).repeat(3, 1).bfloat16()
    numbers = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    half = choose_tokens(logits, numbers, vocab_size=509, temperature=0.9)
    full = choose_tokens(logits.float(), numbers, vocab_size=509, temperature=0.9)
    assert torch.equal(half[0], full[0]) and torch.equal(half[1], full[1])


def test_numbers_depend_on_every_counter_and_on_no_neighbour() -> None:
    sample = torch.arange(40).repeat_interleave(50)
    position = torch.arange(50).repeat(40)
    numbers = sampling_numbers(5, 3, sample, position)
    assert numbers.dtype == torch.float64 and bool(((numbers >= 0) & (numbers < 1)).all())
    assert numbers.unique().numel() == 2000
    assert abs(float(numbers.mean()) - 0.5) < 0.03 and abs(float(numbers.var()) - 1 / 12) < 0.005
    some = torch.tensor([1999, 3, 77])
    assert torch.equal(sampling_numbers(5, 3, sample[some], position[some]), numbers[some])
    for other in (
        sampling_numbers(6, 3, sample, position),
        sampling_numbers(5, 4, sample, position),
        uniform_hash(5, 3, sample, position),  # what the random selector draws
    ):
        correlation = torch.corrcoef(torch.stack([numbers, other]))[0, 1]
        assert abs(float(correlation)) < 0.1
