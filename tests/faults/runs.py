"""A tiny run on two ranks that leaves all of itself behind, for comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.oracle.cases import make_pair

ITERATIONS = 5
TIMES = ("time_rollout", "time_score", "time_train", "time_step", "tokens_per_second")


def make_inputs(root: Path) -> None:
    """A pair of models and prompts."""
    make_pair(root, "qwen3", tied_student=True)
    prompts = [{"id": f"p{i}", "prompt_tokens": [3 + i, 40 + i, 100 + i]} for i in range(10)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def words(root: Path, out: Path, *further: str) -> list[str]:
    """A run that generates, carries quantiles, has a schedule and shards its optimizer."""
    return [
        "train",
        f"--student={root / 'student'}",
        f"--teacher={root / 'teacher'}",
        f"--prompt-data={root / 'prompts.jsonl'}",
        "--max-response-length=6",
        "--global-batch-size=4",
        f"--train-iters={ITERATIONS}",
        "--selection-scope=carried",
        "--keep-ratio=0.3",
        "--lr=1e-3",
        "--lr-decay-style=cosine",
        "--lr-warmup-iters=2",
        "--use-distributed-optimizer",
        f"--log-dir={out}",
        f"--export-hf={out / 'hf'}",
        f"--save={out / 'checkpoints'}",
        f"--load={out / 'checkpoints'}",
        "--save-interval=1",
        "--keep-last-checkpoints=2",
        *further,
    ]


def lines(out: Path) -> list[dict[str, Any]]:
    """Metrics, without times; a line that is being written is left out."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same(out: Path, straight: Path) -> None:
    """Every number and every weight, to the bit."""
    assert lines(out) == lines(straight)
    wanted, found = load_file(straight / "hf/model.safetensors"), load_file(out / "hf/model.safetensors")
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name
