"""The live student against transformers, at every layout, in the middle of training too."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_taopd.testing import WorkerPool
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.data.tokenizers_for_tests import SPECIAL, save_word_tokenizer
from tests.rollout import engine_cases as cases
from tests.rollout.engine_cases import GENERATION_LAYOUTS, LAYOUTS, MAX_RESPONSE, PROMPTS, RUNS

Pool = Callable[[int], WorkerPool]
VOCAB = 509
KINDS = {"qwen3": ("qwen3", False), "llama-tied": ("llama", True)}


@cache
def reference(path: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def reference_greedy(path: str, prompt: list[int], stop_tokens: list[int]) -> list[int]:
    model = reference(path)
    ids = torch.tensor([prompt])
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=MAX_RESPONSE,
        eos_token_id=stop_tokens,
        pad_token_id=0,
    )
    return answer[0, len(prompt) :].tolist()


@torch.no_grad()
def reference_logprobs(path: str, rollout: dict[str, Any], temperature: float, vocab: int) -> torch.Tensor:
    prompt, response = rollout["prompt_tokens"], rollout["response_tokens"]
    logits = reference(path)(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :vocab]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[int]]]:
    """Directory and stop tokens of each student; two of the stop tokens are ones that it really says."""
    made = {}
    for name, (family, tied) in KINDS.items():
        path = tmp_path_factory.mktemp(name)
        save_tiny_hf_model(path, family, tied=tied, vocab_size=VOCAB, seed=5)
        said = [reference_greedy(str(path), list(PROMPTS[i]), [2]) for i in (0, 2)]
        stop_tokens = [2, said[0][5], said[1][3]]
        generation = json.loads((path / "generation_config.json").read_text())
        (path / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": stop_tokens}))
        made[name] = (str(path), stop_tokens)
    return made


def merged(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The answers of all replicas in global order; all ranks of a replica must have given the same."""
    replicas: dict[int, dict[str, Any]] = {}
    for result in results:
        answers = replicas.setdefault(result["replica"], result["answers"])
        assert result["answers"] == answers
    names = results[0]["answers"]
    return {name: [r for i in sorted(replicas) for r in replicas[i][name]] for name in names}


def tokens(rollouts: list[dict[str, Any]]) -> list[list[int]]:
    return [r["response_tokens"] for r in rollouts]


@pytest.fixture(scope="module")
def at_one_rank(students: dict[str, tuple[str, list[int]]], pool: Pool) -> dict[str, Any]:
    return {name: merged(pool(1).run(cases.generation_case, path, "TP1")) for name, (path, _) in students.items()}


@pytest.mark.parametrize("name", KINDS)
def test_against_transformers(
    students: dict[str, tuple[str, list[int]]], at_one_rank: dict[str, Any], name: str
) -> None:
    path, stop_tokens = students[name]
    answers = at_one_rank[name]
    wanted = [reference_greedy(path, list(prompt), stop_tokens) for prompt in PROMPTS]
    assert tokens(answers["greedy"]) == wanted
    reasons = {r["finish_reason"] for r in answers["greedy"]}
    assert reasons == {"stop", "length"}  # both kinds are compared

    for run, rollouts in answers.items():
        options, _ = RUNS.get(run, (cases.SAMPLED, 3))
        vocab = cases.COMMON_VOCAB if run == "part of the vocabulary" else VOCAB
        assert [tuple(r["prompt_tokens"]) for r in rollouts] == [tuple(p) for p in PROMPTS]
        assert [(r["id"], r["extra"]) for r in rollouts] == [(f"p{i}", {"row": i}) for i in range(len(PROMPTS))]
        for r in rollouts:
            response = r["response_tokens"]
            assert max(response) < vocab
            assert not set(response[:-1]) & set(stop_tokens)
            if r["finish_reason"] == "stop":
                assert response[-1] in stop_tokens and len(response) <= MAX_RESPONSE
            else:
                assert response[-1] not in stop_tokens and len(response) == MAX_RESPONSE
            wanted_logprobs = reference_logprobs(path, r, options["temperature"] or 1.0, vocab)
            torch.testing.assert_close(torch.tensor(r["response_logprobs"]), wanted_logprobs, atol=1e-4, rtol=0)


def test_what_the_samples_depend_on(at_one_rank: dict[str, Any]) -> None:
    answers = at_one_rank["qwen3"]
    sampled = tokens(answers["sampled"])
    assert answers["again"] == answers["sampled"]
    assert tokens(answers["small batches"]) == sampled
    for other in ("next step", "other seed", "greedy"):
        assert sum(a == b for a, b in zip(tokens(answers[other]), sampled, strict=True)) <= 1


@pytest.mark.parametrize(
    ("layout", "name"),
    [(layout, "qwen3") for layout in GENERATION_LAYOUTS if layout != "TP1"] + [("TP2PP2SP", "llama-tied")],
)
def test_layouts_agree(
    students: dict[str, tuple[str, list[int]]],
    at_one_rank: dict[str, Any],
    pool: Pool,
    layout: str,
    name: str,
) -> None:
    path, _ = students[name]
    answers = merged(pool(GENERATION_LAYOUTS[layout][0]).run(cases.generation_case, path, layout))
    for run, wanted in at_one_rank[name].items():
        assert tokens(answers[run]) == tokens(wanted), run
        for ours, theirs in zip(answers[run], wanted, strict=True):
            assert ours["response_logprobs"] == pytest.approx(theirs["response_logprobs"], abs=1e-4)
            assert {**ours, "response_logprobs": 0} == {**theirs, "response_logprobs": 0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_the_middle_of_training(
    students: dict[str, tuple[str, list[int]]], pool: Pool, tmp_path: Path, layout: str
) -> None:
    path, stop_tokens = students["qwen3"]
    other = str(save_tiny_hf_model(tmp_path / "other", "qwen3", vocab_size=VOCAB, seed=6))
    answers = merged(pool(LAYOUTS[layout][0]).run(cases.training_case, path, other, layout))
    # The weights are the other student's now; the stop tokens are still this one's.
    wanted = [reference_greedy(other, list(prompt), stop_tokens) for prompt in PROMPTS]
    assert tokens(answers["greedy"]) == wanted


@pytest.mark.parametrize("layout", ["TP1", "TP2PP2SP"])
def test_refusals(students: dict[str, tuple[str, list[int]]], pool: Pool, layout: str) -> None:
    path, _ = students["qwen3"]
    for messages in pool(LAYOUTS[layout][0]).run(cases.refusal_case, path, layout):
        long, foreign, no_room, sick = messages
        assert "'long'" in long and "503 tokens" in long and "512 positions" in long
        assert "'foreign'" in foreign and "509" in foreign and "tokenizer" in foreign
        assert "--max-response-length 512" in no_room and "512 positions" in no_room
        assert "'sick'" in sick and "not finite" in sick


def test_names_text_and_progress(students: dict[str, tuple[str, list[int]]], pool: Pool, tmp_path: Path) -> None:
    save_tiny_hf_model(tmp_path, "llama", vocab_size=VOCAB, hidden_size=16, num_layers=1, ffn_size=16)
    save_word_tokenizer(tmp_path, [f"w{i}" for i in range(VOCAB - len(SPECIAL))])
    (result,) = pool(1).run(cases.sample_names, str(tmp_path))
    rollouts = result["rollouts"]
    assert [r["id"] for r in rollouts] == ["a/2", "b/0", "b/1", "b/2"]
    assert len({tuple(r["response_tokens"]) for r in rollouts}) == 4
    for r in rollouts:
        words = [f"w{t - len(SPECIAL)}" for t in r["response_tokens"] if t >= len(SPECIAL) or t == 1]
        assert r["response"] == " ".join(words)
    assert result["progress"] == [(4, 4)] and result["none"] == []
