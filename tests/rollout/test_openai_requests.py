"""Requests to a real HTTP server that serves a small model as vLLM and as SGLang do: answers, failures, bounds."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_taopd.errors import ConfigError, RolloutError
from megatron_taopd.rollout.config import RolloutConfig
from megatron_taopd.rollout.openai import client
from megatron_taopd.rollout.openai.api import APIS, Sampling, ServerAnswer
from megatron_taopd.rollout.openai.config import RolloutServerConfig
from megatron_taopd.rollout.openai.requests import Batch, Question, Requests
from megatron_taopd.testing.rollout_server import RolloutServer
from megatron_taopd.testing.tiny_models import save_tiny_hf_model

PROMPTS = ([7], [31, 5, 250, 12, 9, 77], [100, 101, 102], [8, 15, 16, 23])
LENGTH = 6
GREEDY = Sampling(max_tokens=LENGTH, temperature=0.0, top_p=1.0, stop_tokens=[2])


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [
        save_tiny_hf_model(
            tmp_path_factory.mktemp("model"),
            "qwen3",
            vocab_size=300,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            ffn_size=32,
            seed=seed,
        )
        for seed in (1, 2)
    ]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)


@pytest.fixture
def server(directories: list[Path]) -> Iterator[RolloutServer]:
    with RolloutServer(directories[0]) as server:
        yield server


def requests(
    server: RolloutServer | str,
    api: str,
    *,
    sampling: Sampling = GREEDY,
    at_once: int = 4,
    retries: int = 3,
    timeout: float = 20.0,
    api_key: str | None = None,
    why_unusable: Callable[[ServerAnswer], str | None] = lambda answer: None,
) -> Requests:
    url = server if isinstance(server, str) else server.url
    http = client.HttpClient([url], api_key=api_key, timeout=timeout, retries=retries, connections=at_once)
    return Requests(http, APIS[api](), sampling, at_once=at_once, why_unusable=why_unusable)


def ask(asking: Requests, *, seeds: int = 1) -> Batch[ServerAnswer]:
    questions = [Question(i, prompt, 0, list(range(i, i + seeds))) for i, prompt in enumerate(PROMPTS)]
    batch = asking.begin(questions)
    assert batch.wait(60)
    return batch


@torch.no_grad()
def transformers_greedy(directory: Path, prompt: list[int], stops: list[int]) -> tuple[list[int], torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([prompt])
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH, eos_token_id=stops
    )
    tokens = said[0, len(prompt) :]
    logits = model(said).logits[0, len(prompt) - 1 : -1]
    return tokens.tolist(), logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("api", APIS)
def test_greedy_answers_and_their_logprobs_are_the_models(server: RolloutServer, directories, api: str) -> None:
    stop = transformers_greedy(directories[0], list(PROMPTS[1]), [2])[0][3]  # one that it does say
    sampling = Sampling(max_tokens=LENGTH, temperature=0.0, top_p=1.0, stop_tokens=[2, stop])
    batch = ask(requests(server, api, sampling=sampling))
    for place, prompt in enumerate(PROMPTS):
        tokens, logprobs = transformers_greedy(directories[0], list(prompt), [2, stop])
        answer = batch.results[place]
        assert answer.tokens == tokens
        assert torch.tensor(answer.logprobs) == pytest.approx(logprobs, abs=1e-4)
        assert answer.finish_reason == ("stop" if tokens[-1] in (2, stop) else "length")
        assert answer.weights == ("default" if api == "sglang" else None)
    assert batch.results[1].finish_reason == "stop" and batch.results[1].tokens[-1] == stop


@pytest.mark.parametrize("api", APIS)
def test_sampled_answers_depend_on_their_seed_alone(server: RolloutServer, api: str) -> None:
    sampling = Sampling(max_tokens=LENGTH, temperature=1.3, top_p=1.0, stop_tokens=[2])
    batches = [ask(requests(server, api, sampling=sampling, at_once=at_once)) for at_once in (1, 4)]
    assert batches[0].results == batches[1].results
    other = requests(server, api, sampling=sampling).begin([Question(0, PROMPTS[0], 0, [99])])
    assert other.wait(60) and other.results[0].tokens != batches[0].results[0].tokens


@pytest.mark.parametrize("api", APIS)
def test_requests_are_made_again_after_a_busy_server_and_lost_connections(server: RolloutServer, api: str) -> None:
    undisturbed = ask(requests(server, api))
    server.faults += ["busy", "reset", "torn"]
    batch = ask(requests(server, api))
    assert batch.results == undisturbed.results
    assert (batch.counts.repeated, batch.counts.dropped) == (3, 0)


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE", 1.0)
    for attempt, longest in ((1, 1.0), (2, 2.0), (4, 8.0), (12, client.LONGEST_PAUSE)):
        pauses = {client.pause_before(attempt) for _ in range(20)}
        assert len(pauses) == 20 and all(longest / 2 <= pause <= longest for pause in pauses)


def failure_of(asking: Requests) -> str:
    with pytest.raises(RolloutError) as failure:
        ask(asking)
    return str(failure.value)


def test_a_server_that_stays_busy_is_given_up(server: RolloutServer) -> None:
    server.faults += ["busy"] * 40
    message = failure_of(requests(server, "vllm", retries=2))
    for word in (f"{server.url}/v1/completions", "503", "--rollout-max-in-flight", "--rollout-retries"):
        assert word in message
    assert len(server.paths) >= 3


def test_a_silent_server_is_given_up(server: RolloutServer) -> None:
    server.faults += ["silent"] * 8
    started = time.monotonic()
    message = failure_of(requests(server, "sglang", retries=1, timeout=0.2))
    assert time.monotonic() - started < 10
    for word in (f"{server.url}/generate", "0.2 s", "2 times", "--rollout-timeout"):
        assert word in message


def test_no_server_at_all() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        message = failure_of(requests(url, "sglang", retries=1))
    for word in (f"{url}/generate", "cannot be reached", "2 times"):
        assert word in message


def test_nothing_but_the_given_server_is_contacted(
    server: RolloutServer, directories: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with RolloutServer(directories[1]) as other:
        server.faults += ["moved"] * 8
        server.elsewhere = other.url
        message = failure_of(requests(server, "sglang"))
        assert "307" in message and "not followed" in message
        server.faults.clear()
        monkeypatch.setenv("http_proxy", other.url)
        monkeypatch.setenv("ALL_PROXY", other.url)
        ask(requests(server, "sglang"))
        assert other.paths == []


def test_a_server_never_sees_more_requests_than_allowed(server: RolloutServer) -> None:
    server.seconds_per_answer = 0.05
    asking = requests(server, "vllm", at_once=3)
    for _ in range(2):  # the threads of the first batch serve the second one
        batch = asking.begin([Question(i, PROMPTS[0], 0, [i]) for i in range(9)])
        assert batch.wait(60)
    assert server.most_in_flight == 3
    assert len(server.paths) == 18


def change(api: str, **fields: Any) -> Callable[[dict], dict]:
    """A fault that changes fields of the response in an answer."""

    def changed(body: dict) -> dict:
        where = body["choices"][0] if api == "vllm" else body["meta_info"]
        where.update(fields)
        return body

    return changed


MALFORMED: dict[str, tuple[str, Callable[[dict], Any], str]] = {
    "an old vLLM": ("vllm", change("vllm", token_ids=None), "return_token_ids"),
    "another prompt": ("vllm", change("vllm", prompt_token_ids=[1]), "'prompt_token_ids'"),
    "no log-probabilities": ("vllm", change("vllm", logprobs=None), "no log-probabilities"),
    "too few of them": ("vllm", change("vllm", logprobs={"token_logprobs": [-1.0]}), "1 log-probabilities"),
    "one that is none": ("vllm", change("vllm", token_ids=[5], logprobs={"token_logprobs": [0.5]}), "0.5"),
    "two choices": ("vllm", lambda body: {"choices": body["choices"] * 2}, "'choices'"),
    "unknown end": ("vllm", change("vllm", finish_reason="tool_calls"), "tool_calls"),
    "no meta_info": ("sglang", lambda body: {"text": "hello"}, "'meta_info'"),
    "a cut prompt": ("sglang", change("sglang", prompt_tokens=0), "0 prompt tokens"),
    "log-probabilities switched off": ("sglang", change("sglang", output_token_logprobs=None), "output_token_logprobs"),
    "ids that are words": ("sglang", change("sglang", output_token_logprobs=[[-1.0, "a", None]]), "token ids"),
    "a list": ("sglang", lambda body: [body], "no JSON object"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_answer_is_named(server: RolloutServer, name: str) -> None:
    api, fault, word = MALFORMED[name]
    server.faults.append(fault)
    message = failure_of(requests(server, api, at_once=1))
    assert server.url in message and word in message and "--rollout-api" in message


def test_an_unusable_response_is_asked_for_again_with_another_seed(server: RolloutServer) -> None:
    wanted = ask(requests(server, "sglang")).results

    def why_unusable(answer: ServerAnswer) -> str | None:
        return None if answer.weights == "default" else f"weights {answer.weights}"

    server.faults += [change("sglang", weight_version="other")] * 2
    batch = ask(requests(server, "sglang", at_once=1, why_unusable=why_unusable), seeds=3)
    assert batch.counts.dropped == 2 and batch.results == wanted

    server.faults += [change("sglang", weight_version="other")] * 2
    with pytest.raises(RolloutError, match="weights other .2 responses thrown away"):
        ask(requests(server, "sglang", at_once=1, why_unusable=why_unusable), seeds=2)


def test_the_key_is_sent_and_never_shown(directories: list[Path], tmp_path: Path) -> None:
    with RolloutServer(directories[0], api_key="s3cret") as server:
        ask(requests(server, "vllm", api_key="s3cret"))
        message = failure_of(requests(server, "vllm", api_key="0ther"))
        assert "401" in message and "--rollout-api-key-env" in message and "0ther" not in message
        http = requests(server, "vllm", api_key="s3cret").client
        with pytest.raises(RolloutError) as failure:  # the server repeats what it was sent
            http.post(0, APIS["vllm"]().load_weights(str(tmp_path / "s3cret"), "1")[0])
    assert "400" in str(failure.value) and "no model directory" in str(failure.value)
    assert "s3cret" not in str(failure.value) and "***" in str(failure.value)


@pytest.mark.parametrize("api", APIS)
def test_new_weights_change_the_answers(server: RolloutServer, directories: list[Path], api: str) -> None:
    asking = requests(server, api)
    before = ask(asking).results
    for call in asking.api.load_weights(str(directories[1]), "taopd-x-5"):
        body, _ = asking.client.post(0, call)
        asking.api.check_loaded(body)
    after = ask(asking).results
    places = range(len(PROMPTS))
    assert [after[i].tokens for i in places] == [
        transformers_greedy(directories[1], list(prompt), [2])[0] for prompt in PROMPTS
    ]
    assert [after[i].tokens for i in places] != [before[i].tokens for i in places]
    assert {answer.weights for answer in after.values()} == {"taopd-x-5" if api == "sglang" else None}


OPENAI = RolloutConfig(rollout_engine="openai")
GOOD: dict[str, Any] = {"rollout_url": ["http://a:1"], "rollout_api": "sglang", "rollout_weights_every": 0}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"rollout_url": []}, ("--rollout-url",)),
        ({"rollout_url": ["a:1"]}, ("--rollout-url a:1", "http://")),
        ({"rollout_url": ["http://user:pass@a:1"]}, ("--rollout-api-key-env",)),
        ({"rollout_url": ["http://a:1", "http://a:1/v1/"]}, ("http://a:1", "2 times")),
        ({"rollout_api": None}, ("--rollout-api", "vllm", "sglang")),
        ({"rollout_weights_every": None}, ("--rollout-weights-every",)),
        ({"rollout_weights_every": 2}, ("--rollout-weights-dir",)),
        ({"rollout_weights_dir": "/d"}, ("--rollout-weights-dir /d", "no effect")),
        (
            {"rollout_weights_every": 4, "rollout_weights_dir": "/d", "max_staleness": 2},
            ("--max-staleness 2", "3 steps"),
        ),
        ({"max_staleness": 5}, ("--max-staleness 5", "9 steps")),
        ({"max_staleness": -1}, ("--max-staleness -1",)),
        ({"rollout_retries": -1}, ("--rollout-retries -1",)),
        ({"rollout_max_in_flight": 0}, ("--rollout-max-in-flight 0",)),
        ({"rollout_timeout": 0.0}, ("--rollout-timeout 0.0",)),
    ],
)
def test_refused(settings: dict[str, Any], wanted: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refusal:
        RolloutServerConfig(**(GOOD | settings)).check_against(OPENAI, train_iters=10)
    for word in wanted:
        assert word in str(refusal.value)
    assert "pass@" not in str(refusal.value)


def test_flags_of_servers_have_no_effect_with_other_engines() -> None:
    with pytest.raises(ConfigError, match="--rollout-timeout 5.0 has no effect with --rollout-engine megatron"):
        RolloutServerConfig(rollout_timeout=5.0).check_against(RolloutConfig(), train_iters=10)
    RolloutServerConfig().check_against(RolloutConfig(), train_iters=10)


def test_bounds_and_roots() -> None:
    assert RolloutServerConfig(rollout_url=["http://a:1/v1/", "https://b/x"]).rollout_url == [
        "http://a:1",
        "https://b/x",
    ]
    assert RolloutServerConfig(rollout_weights_every=3).staleness_bound == 2
    assert RolloutServerConfig(rollout_weights_every=0).staleness_bound is None
    assert RolloutServerConfig(rollout_weights_every=0, max_staleness=7).staleness_bound == 7


def test_a_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RolloutServerConfig(rollout_api_key_env="TAOPD_TEST_KEY")
    with pytest.raises(ConfigError, match="TAOPD_TEST_KEY"):
        config.api_key()
    monkeypatch.setenv("TAOPD_TEST_KEY", "k")
    assert config.api_key() == "k"
    assert RolloutServerConfig().api_key() is None
