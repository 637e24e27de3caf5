"""The generation loop: values that it keeps, work that it does not do, and sampling over shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from megatron_taopd.rollout.megatron.prefill import FORWARD_COST, prefill_groups
from megatron_taopd.rollout.megatron.products import linear, logits_of
from megatron_taopd.rollout.sampling import choose_tokens
from megatron_taopd.testing import WorkerPool
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.rollout import generation_cases as cases
from tests.rollout.generation_cases import EXPERT_LAYOUTS, LAYOUTS, MAX_RESPONSE, STOP_TOKENS

Pool = Callable[[int], WorkerPool]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_hf_model(tmp_path_factory.mktemp("student"), "qwen3", vocab_size=509, seed=8))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_hf_model(tmp_path_factory.mktemp("mixture"), "qwen3_moe", vocab_size=509, seed=8))


@cache
def reference(path: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def reference_hidden(path: str, prompt: list[int], response: list[int]) -> torch.Tensor:
    states = reference(path).model(torch.tensor([prompt + response])).last_hidden_state[0]
    return states[len(prompt) - 1 : -1]


def check_hidden(path: str, results: list[dict[str, Any]]) -> None:
    """On last-stage ranks they are transformers' of the finished sequence; elsewhere there are none."""
    for result in results:
        for (prompt, response), hidden in zip(result["tokens"], result["hidden"], strict=True):
            if result["last stage"]:
                torch.testing.assert_close(hidden, reference_hidden(path, prompt, response), atol=1e-4, rtol=0)
            else:
                assert hidden is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_states_are_those_of_a_plain_forward(student: str, pool: Pool, layout: str) -> None:
    results = pool(LAYOUTS[layout][0]).run(cases.hidden_case, student, layout)
    assert all(result["tokens"] == results[0]["tokens"] for result in results)
    lengths = [len(response) for _, response in results[0]["tokens"]]
    assert min(lengths) < MAX_RESPONSE == max(lengths)
    assert sum(result["last stage"] for result in results) == (1 if layout in ("TP1", "PP2") else 2)
    check_hidden(student, results)


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_replicas_that_share_experts(mixture: str, pool: Pool, layout: str) -> None:
    """They answer different numbers of prompts, of different lengths, and do not wait for each other forever."""
    (alone,) = pool(1).run(cases.hidden_case, mixture, "TP1")
    check_hidden(mixture, [alone])
    results = pool(EXPERT_LAYOUTS[layout][0]).run(cases.hidden_case, mixture, layout)
    shares = {result["replica"]: result["tokens"] for result in results}
    assert all(result["tokens"] == shares[result["replica"]] for result in results)
    assert [answer for replica in sorted(shares) for answer in shares[replica]] == alone["tokens"]
    check_hidden(mixture, results)


def test_hidden_states_have_the_type_of_the_model(student: str, pool: Pool) -> None:
    (result,) = pool(1).run(cases.hidden_case, student, "TP1", torch.bfloat16)
    for (prompt, response), hidden in zip(result["tokens"], result["hidden"], strict=True):
        assert hidden.dtype == torch.bfloat16
        wanted = reference_hidden(student, prompt, response)
        assert float((hidden.float() - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("layout", ["TP1", "PP2"])
def test_no_forward_in_vain(student: str, pool: Pool, layout: str) -> None:
    """Each different prompt is read once; then each step reads one token of the samples that have not ended."""
    lengths = sorted({tuple(p.tokens): len(p.tokens) for p in cases.make_prompts()}.values())
    groups = prefill_groups(lengths)
    assert 1 < len(groups) < len(lengths)
    prefill = [(g.stop - g.start, lengths[g.stop - 1]) for g in groups]
    for result in pool(LAYOUTS[layout][0]).run(cases.forwards_case, student, layout):
        alive = [sum(n > step for n in result["lengths"]) for step in range(1, max(result["lengths"]))]
        assert result["shapes"] == prefill + [(rows, 1) for rows in alive]
        assert len(set(alive)) > 3  # samples left at different steps


@pytest.mark.parametrize("options", [{"temperature": 0.9}, {"temperature": 1.2, "top_p": 0.8}, {"temperature": 0.0}])
def test_a_batch_gives_what_each_prompt_gives_alone(student: str, pool: Pool, options: dict[str, float]) -> None:
    found = pool(1).run(cases.single_case, student, **options)[0]
    reasons = set()
    for together, alone in zip(found["together"], found["alone"], strict=True):
        assert together[0] == alone[0] and together[2] == alone[2]
        assert together[1] == pytest.approx(alone[1], abs=1e-5)
        assert (together[2] == "stop") == (together[0][-1] in STOP_TOKENS)
        reasons.add(together[2])
    assert "stop" in reasons


def test_prompts_are_grouped_at_the_lowest_cost() -> None:
    def cost(lengths: list[int], groups: list[slice]) -> int:
        return sum((g.stop - g.start) * lengths[g.stop - 1] + FORWARD_COST for g in groups)

    def all_splits(count: int) -> list[list[slice]]:
        if not count:
            return [[]]
        return [[*head, slice(start, count)] for start in range(count) for head in all_splits(start)]

    for lengths in ([5], [7, 7, 7], [1, 2, 90, 95], [10, 40, 45, 80, 200, 210], [1, 30, 59, 88, 117, 146, 175]):
        groups = prefill_groups(lengths)
        assert [i for g in groups for i in range(g.start, g.stop)] == list(range(len(lengths)))
        assert cost(lengths, groups) == min(cost(lengths, split) for split in all_splits(len(lengths)))
    assert prefill_groups([50] * 6, max_tokens=100) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert prefill_groups([500, 600], max_tokens=100) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("vocab", [1024, 509])
def test_products_of_few_rows_are_products(vocab: int) -> None:
    generator = torch.Generator().manual_seed(5)
    head = torch.randn(vocab, 48, generator=generator)
    for rows in (1, 3, 5, 64, 65):
        hidden = torch.randn(rows, 48, generator=generator)
        found = logits_of(hidden, head)
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), hidden.double() @ head.double().t(), atol=1e-4, rtol=1e-5)
    for shape in ((0, 48), (3, 48), (2, 2, 48), (7, 1, 48)):
        rows, bias = torch.randn(shape, generator=generator), torch.randn(vocab, generator=generator)
        torch.testing.assert_close(linear(rows, head, bias), rows @ head.t() + bias, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sampling_over_shards_is_sampling(pool: Pool, ranks: int) -> None:
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(300, 1024, generator=generator) * 3
    logits[:50] = logits[:50].round()  # equal maxima in different shards
    numbers = torch.rand(300, generator=generator, dtype=torch.float64)
    numbers[0], extreme = 0.0, 7
    numbers[extreme] = 1.0 - 2.0**-53  # rounding decides which of the last tokens it is
    same = torch.arange(300) != extreme
    settings: list[dict[str, Any]] = [
        {"vocab_size": vocab, "temperature": temperature, "top_p": top_p}
        for vocab in (1024, 509, 200)  # also where the last shards are padding alone
        for temperature, top_p in ((1.0, None), (0.6, None), (0.0, None), (1.5, 0.9))
    ]
    for answers in pool(ranks).run(cases.sharded_sampling_case, logits, numbers, settings):
        for setting, (tokens, logprobs) in zip(settings, answers, strict=True):
            wanted_tokens, wanted_logprobs = choose_tokens(logits, numbers, **setting)
            assert torch.equal(tokens[same], wanted_tokens[same]), setting
            torch.testing.assert_close(logprobs[same], wanted_logprobs[same], atol=1e-5, rtol=1e-5)
            assert int(tokens.max()) < setting["vocab_size"] and bool(logprobs.isfinite().all())


def test_the_nucleus_is_found_among_few_and_among_all() -> None:
    generator = torch.Generator().manual_seed(7)
    flat = torch.randn(4, 5000, generator=generator) * 0.1  # thousands of tokens make up the nucleus
    peaked = torch.randn(4, 5000, generator=generator) * 6
    for logits in (flat, peaked):
        probs = logits.double().softmax(-1)
        order = probs.argsort(-1, descending=True)
        before = probs.gather(-1, order).cumsum(-1) - probs.gather(-1, order)
        for row in range(4):
            nucleus = order[row][before[row] < 0.7].sort().values
            shares = probs[row][nucleus].cumsum(0) / probs[row][nucleus].sum()
            numbers = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
            found, _ = choose_tokens(logits[row].expand(50, -1), numbers, vocab_size=5000, temperature=1.0, top_p=0.7)
            wanted = nucleus[torch.searchsorted(shares, numbers, right=True)]
            assert (found != wanted).sum() <= 1  # a number may lie on an edge, up to rounding
