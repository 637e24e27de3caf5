"""Models answer: one that is right by construction, and a random one at several layouts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_taopd.data.records import read_rollouts
from megatron_taopd.testing import WorkerPool
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.data.tokenizers_for_tests import SPECIAL, TEMPLATE, save_word_tokenizer
from tests.evaluation import model_cases as cases
from tests.evaluation.certain import NUMBER, save_certain_model

Pool = Callable[[int], WorkerPool]
EOS = SPECIAL.index("<eos>")
SUMS = "reasoning_gym:chain_sum"


@pytest.fixture(scope="module")
def certain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers q3 with a3."""
    return save_certain_model(tmp_path_factory.mktemp("certain"))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that ends one response in some, with the words of sums."""
    path = tmp_path_factory.mktemp("random")
    words = ["State", "the", "final", "answer", "to", "following", "arithmetic", "problem:", "+", "-", "="]
    words += [str(i) for i in range(-9, 100)]
    words += [f"w{i}" for i in range(509 - len(SPECIAL) - len(words))]
    save_tiny_hf_model(path, "qwen3", num_layers=2, seed=5)
    save_word_tokenizer(path, words, chat_template=TEMPLATE)
    generation = json.loads((path / "generation_config.json").read_text())
    generation["eos_token_id"] = [EOS, *range(300, 340)]
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def write(path: Path, answers: dict[str, str]) -> str:
    lines = ({"id": f"id-{q}", "problem": q, "answer": a} for q, a in answers.items())
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def read(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    return json.loads((out / "results.json").read_text()), lines


def test_a_model_that_is_right_by_construction(certain: Path, pool: Pool, tmp_path: Path) -> None:
    right = write(tmp_path / "right.jsonl", {f"q{i}": f"a{i}" for i in range(NUMBER)})
    # three of nine are answered with another number, and one problem has another question's answer
    some = {f"q{i}": f"a{i if i < 5 else i - 1}" for i in range(NUMBER)}
    words = [f"--model={certain}", f"--output={tmp_path}/out", "--prompt-style=raw", "--max-response-length=5"]
    tasks = [f"--task=exact:{right}", f"--task=some=exact:{write(tmp_path / 's.jsonl', some)}"]
    assert pool(1).run(cases.command_case, [*words, *tasks, "--seed=7"]) == [None]
    results, lines = read(tmp_path / "out")
    assert {name: found["pass@1"] for name, found in results["tasks"].items()} == {"right": 1.0, "some": 5 / 9}
    found = results["tasks"]["right"]
    assert found["mean_response_length"] == 2.0 and found["stop_share"] == 1.0 and found["answered_share"] == 1.0
    assert found["options"]["prompt_style"] == "raw" and found["options"]["max_response_length"] == 5
    assert results["model"] == str(certain) and results["seed"] == 7
    assert [line["response"] for line in lines] == 2 * [f"a{i}" for i in range(NUMBER)]
    assert [line["problem"] for line in lines[:2]] == ["id-q0", "id-q1"]
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert config["model"] == str(certain) and config["max_response_length"] == 5


def test_layouts_give_the_same(random_model: Path, pool: Pool, tmp_path: Path) -> None:
    # What the model says greedily is the right answer to every other problem.
    problems = {f"w{i} w{i + 7}": "" for i in range(5)}
    style = ["--prompt-template={problem}", "--max-response-length=12", "--extract=whole"]
    greedy = [f"--model={random_model}", f"--output={tmp_path}/greedy", *style]
    assert pool(1).run(cases.command_case, [*greedy, f"--task=exact:{write(tmp_path / 'p.jsonl', problems)}"]) == [None]
    said = [line["response"] for line in read(tmp_path / "greedy")[1]]
    assert all(said)
    golds = {q: text if i % 2 == 0 else "-" for i, (q, text) in enumerate(zip(problems, said, strict=True))}
    (tmp_path / "sums.yaml").write_text(
        "kind: reasoning_gym\ngenerator: chain_sum\nnum-samples: 3\ntemperature: 0.9\nsize: 5\n"
        "generator-settings: {min_digits: 1, max_digits: 1}\n"
    )
    tasks = [f"--task=halves=exact:{write(tmp_path / 'h.jsonl', golds)}", f"--task={tmp_path}/sums.yaml"]
    found = {}
    for name, ranks, flags in (
        ("TP1", 1, []),
        ("TP2", 2, ["--tensor-model-parallel-size=2", "--sequence-parallel"]),
        ("DP2", 2, ["--rollout-batch-size=2"]),
    ):
        words = [f"--model={random_model}", f"--output={tmp_path}/{name}", *style, *tasks, *flags]
        assert pool(ranks).run(cases.command_case, words) == [None] * ranks
        found[name] = read(tmp_path / name)
    results, lines = found["TP1"]
    for other, other_lines in (found["TP2"], found["DP2"]):
        assert without_seconds(other) == without_seconds(results)
        for ours, theirs in zip(other_lines, lines, strict=True):
            assert ours.pop("response_logprobs") == pytest.approx(theirs["response_logprobs"], abs=1e-4)
            assert ours == {key: value for key, value in theirs.items() if key != "response_logprobs"}

    rollouts = read_rollouts(tmp_path / "TP1/responses.jsonl", vocab_size=509, max_response_length=12)
    assert [r.response_tokens for r in rollouts] == [line["response_tokens"] for line in lines]
    halves, sums = results["tasks"]["halves"], results["tasks"]["sums"]
    assert halves["pass@1"] == 3 / 5 and halves["samples"] == 1
    of_sums = [line for line in lines if line["task"] == "sums"]
    assert [(line["problem"], line["sample"]) for line in of_sums] == [(str(i), j) for i in range(5) for j in range(3)]
    assert len({line["response"] for line in of_sums}) == 15  # three samples are three, and problems are told apart
    lengths = [len(line["response_tokens"]) for line in of_sums]
    assert sums["mean_response_length"] == pytest.approx(sum(lengths) / 15)
    stops = [line["finish_reason"] == "stop" for line in of_sums]
    assert sums["stop_share"] == pytest.approx(sum(stops) / 15) and 0 < sum(stops) < 15
    for line in of_sums:
        terms = re.search(r"problem: (.+) =", line["messages"][0]["content"])
        assert terms is not None and str(eval(terms[1])) == line["gold"]

    # Fewer samples are the first ones, also when the task is alone.
    words = [f"--model={random_model}", f"--output={tmp_path}/fewer", *style, f"--task={tmp_path}/sums.yaml"]
    assert pool(1).run(cases.command_case, [*words, "--num-samples=2"]) == [None]
    fewer = {(line["problem"], line["sample"]): line["response"] for line in read(tmp_path / "fewer")[1]}
    assert fewer == {(x["problem"], x["sample"]): x["response"] for x in of_sums if x["sample"] < 2}


def without_seconds(results: Any) -> Any:
    if isinstance(results, dict):
        return {key: without_seconds(value) for key, value in results.items() if key != "seconds"}
    return results


def test_a_model_in_training(certain: Path, pool: Pool, tmp_path: Path) -> None:
    file = write(tmp_path / "right.jsonl", {f"q{i}": f"a{i}" for i in range(3)})
    options = {"prompt_style": "raw", "max_response_length": 4}
    per_rank = pool(2).run(cases.live_case, str(certain), f"exact:{file}", options)
    assert per_rank[0] == per_rank[1]  # all ranks know, the times included
    found = {name: results["tasks"]["right"] for name, results in per_rank[0].items()}
    assert found["before"]["pass@1"] == found["again"]["pass@1"] == 1.0 and found["after"]["pass@1"] == 0.0
    assert per_rank[0]["before"]["model"] == "before" and per_rank[0]["again"]["model"] == str(certain)


def test_what_does_not_fit_is_refused_on_all_ranks(random_model: Path, pool: Pool, tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", {"w1": "w2"})
    bare = tmp_path / "bare"
    save_tiny_hf_model(bare, "llama", num_layers=1)
    base = [f"--output={tmp_path}/out", f"--task=exact:{file}"]
    for words, message in (
        ([f"--model={bare}"], "bare has no tokenizer"),
        ([f"--model={random_model}"], "has 3 tokens; with --max-response-length 1024 .* the 512 positions"),
        ([f"--model={random_model}", "--size=2"], "has 1 problems, fewer than --size 2"),
        ([f"--model={tmp_path}/none"], "is not a directory"),
    ):
        for refusal in pool(2).run(cases.command_case, [*base, *words]):
            assert refusal is not None and re.search(message, refusal)
    assert not (tmp_path / "out/results.json").exists()
