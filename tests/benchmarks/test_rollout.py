"""The rollout benchmark: its ablations cost time and change nothing else; its three tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_taopd.testing import WorkerPool
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.benchmarks.test_scripts import script

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [9]]
STOPS = tuple(range(3, 256, 6))
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_hf_model(path, "llama", vocab_size=256, num_layers=2, seed=0)
    return path


def responses(path: Path) -> dict[str, list[list[int]]]:
    from rollout_ablations import ABLATIONS
    from rollout_sides import load_student, megatron_loop, ours

    student = load_student(path)
    engine = ours(student, NEW_TOKENS)
    found = {"ours": engine(PROMPTS, 1, STOPS, 3)}
    for blocks in ABLATIONS.values():
        for name, block in blocks.items():
            with block():
                found[name] = engine(PROMPTS, 1, STOPS, 3)
    found["Megatron's loop"] = megatron_loop(student, NEW_TOKENS)(PROMPTS, 1, STOPS, 3)
    return found


def test_ablations_change_no_token(pool: Callable[[int], WorkerPool], model: Path):
    (found,) = pool(1).run(responses, model)
    loop = found.pop("Megatron's loop")
    for answers in (found["ours"], loop):
        for tokens in answers:
            assert not set(tokens[:-1]) & set(STOPS)
            assert tokens[-1] in STOPS or len(tokens) == NEW_TOKENS
    assert len(found) == 6 and len(set(map(len, found["ours"]))) > 1
    for name, answers in found.items():
        assert answers == found["ours"], name


def test_tables(model: Path, tmp_path: Path):
    words = ["--model", str(model), "--batch", "4", "--new-tokens", "4", "--prompt-lengths", "3", "6"]
    rollout, parts, profile = script("bench_rollout.py", *words, out=tmp_path / "rollout.json")
    assert [row["case"] for row in rollout["rows"]] == ["full length", "early stops", "4 samples a prompt"]
    assert all(row["ratio"] == row["ratio_wall"] > 0 for row in rollout["rows"])
    assert rollout["rows"][0]["ours_tokens"] == rollout["rows"][0]["transformers_tokens"] == [16]
    assert {row["who"]: row["ratio"] for row in parts["rows"] if row["case"] == "early stops"}["ours"] == 1
    assert all(row["tokens"] == [16] for row in parts["rows"] if row["case"] == "full length")
    assert len(parts["rows"]) == 8 + 3 + 2
    assert [row["who"] for row in profile["rows"]] == ["ours", "transformers", "Megatron's loop"]
