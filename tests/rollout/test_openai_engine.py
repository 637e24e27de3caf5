"""``taopd train --rollout-engine openai`` with a real server: the same training as with the live student, at several
layouts; weights, their versions and what happens to old ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_taopd.testing.rollout_server import RolloutServer
from tests.oracle.cases import make_pair
from tests.rollout.openai_cases import served, train

STEPS, BATCH = 2, 8
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("openai")
    make_pair(root, "qwen3")
    prompts = [{"id": f"p{i}", "prompt_tokens": list(range(3, 4 + i * 2 % 7)) + [40 + i]} for i in range(16)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return root


@pytest.fixture
def server(root: Path) -> Iterator[RolloutServer]:
    with RolloutServer(root / "teacher") as server:  # whatever it was started with, it gets the student first
        yield server


@pytest.fixture(scope="module")
def with_megatron(pool, root: Path) -> Path:
    assert pool(1).run(train, root, root / "megatron", {}) == [None]
    return root / "megatron"


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("layout", "api"), [("one", "sglang"), ("dp2", "vllm"), ("tp2", "sglang"), ("cp2", "vllm")])
def test_greedy_training_ends_as_with_the_live_student(
    pool, root: Path, with_megatron: Path, server: RolloutServer, layout: str, api: str
) -> None:
    ranks, flags = LAYOUTS[layout]
    out = root / f"{layout}-{api}"
    assert pool(ranks).run(train, root, out, flags | served(server.url, api, out)) == [None] * ranks
    wanted, got = (load_file(run / "hf" / "model.safetensors") for run in (with_megatron, out))
    start = load_file(root / "student" / "model.safetensors")
    for name, weights in wanted.items():
        if ranks == 1:
            assert torch.equal(got[name], weights), name
        assert torch.allclose(got[name], weights, rtol=1e-3, atol=1e-5), name
    assert any(not torch.equal(start[name], weights) for name, weights in wanted.items())
    for step, (here, there) in enumerate(zip(metrics(out), metrics(with_megatron), strict=True)):
        assert here["response_length"] == there["response_length"]
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-4), step
        assert here["rollout_logprob_gap"] < 1e-4
        assert here["rollout_staleness_max"] == here["rollout_dropped"] == here["rollout_retries"] == 0
    answers = "/v1/completions" if api == "vllm" else "/generate"
    assert server.paths.count(answers) == STEPS * BATCH  # shared by the ranks, none asked twice
    loads = ["/collective_rpc", "/reset_prefix_cache"] if api == "vllm" else ["/update_weights_from_disk"]
    assert [path for path in server.paths if path != answers] == loads * STEPS
    assert [path.name for path in (out / "weights").iterdir()] == ["served_0000001"]  # earlier ones are removed
    assert server.weight_version.endswith("-1") == (api == "sglang")


def test_older_weights_are_told_and_weighed(pool, root: Path, server: RolloutServer) -> None:
    out = root / "every2"
    flags = served(
        server.url,
        "sglang",
        out,
        every=2,
        temperature=1,
        train_iters=4,
        importance_ratio="prefix",
        rollout_max_in_flight=1,
    )
    assert pool(1).run(train, root, out, flags) == [None]
    steps = metrics(out)
    assert [step["rollout_staleness"] for step in steps] == [0, 1, 0, 1]
    for step in steps:
        stale = step["rollout_staleness"] == 1
        assert (step["rollout_logprob_gap"] > 1e-2) == stale
        assert (abs(step["importance_weight"] - 1) > 1e-3) == stale
    assert server.most_in_flight == 1
    assert server.paths.count("/update_weights_from_disk") == 2


def test_an_update_that_fails_leaves_old_weights_within_the_bound_only(pool, root: Path, server: RolloutServer) -> None:
    for bound, wanted in ((1, None), (0, ("RolloutError", server.url, "503"))):
        out = root / f"bound{bound}"
        server.update_faults[:] = [lambda answer: answer, "busy"]  # the second update fails
        saved = out / "checkpoints"
        flags = served(server.url, "sglang", out, max_staleness=bound, rollout_retries=0, train_iters=3, save=saved)
        (message,) = pool(1).run(train, root, out, flags)
        if wanted is None:
            assert message is None
            assert [step["rollout_staleness"] for step in metrics(out)] == [0, 1, 0]
            warnings = [json.loads(line) for line in (out / "warnings.jsonl").read_text().splitlines()]
            assert any("iteration 0 until the next update" in warning["message"] for warning in warnings)
        else:
            assert all(word in message for word in wanted)
            assert len(metrics(out)) == 1
            # The run has saved what it had, and goes on from there with the weights of then.
            assert (saved / "latest_checkpointed_iteration.txt").read_text().strip() == "1"
            assert pool(1).run(train, root, out, flags | {"load": saved}) == [None]
            assert [step["rollout_staleness"] for step in metrics(out)] == [0, 0, 0]
            assert server.weight_version.endswith("-2")
            assert [path.name for path in (out / "weights").iterdir()] == ["served_0000002"]


def test_logprobs_that_are_not_the_students_are_warned_of(pool, root: Path, server: RolloutServer) -> None:
    def at_another_temperature(answer: dict) -> dict:
        for pair in answer["meta_info"]["output_token_logprobs"]:
            pair[0] *= 1.5
        return answer

    server.faults += [at_another_temperature] * 2 * BATCH
    out = root / "gap"
    flags = served(server.url, "sglang", out, temperature=1)
    assert pool(1).run(train, root, out, flags) == [None]
    warnings = [json.loads(line)["message"] for line in (out / "warnings.jsonl").read_text().splitlines()]
    told = [message for message in warnings if "--logprobs-mode processed_logprobs" in message]
    assert len(told) == 1 and f"{metrics(out)[0]['rollout_logprob_gap']:.2f} nats" in told[0]


def test_responses_of_weights_that_are_not_this_runs_are_asked_for_again(
    pool, root: Path, server: RolloutServer
) -> None:
    def started_again(answer: dict) -> dict:
        answer["meta_info"]["weight_version"] = "default"
        return answer

    server.faults += [started_again] * 3
    out = root / "restarted"
    flags = served(server.url, "sglang", out, train_iters=1, rollout_retries=3)
    assert pool(2).run(train, root, out, flags) == [None, None]
    assert metrics(out)[0]["rollout_dropped"] == 3
    assert server.paths.count("/generate") == BATCH + 3

    server.faults += [started_again] * 99
    flags = served(server.url, "sglang", out, train_iters=1, rollout_retries=1)
    messages = pool(2).run(train, root, out, flags)
    for message in messages:  # on all ranks, whoever asked
        assert "RolloutError" in message and "'default' and not of this run" in message
