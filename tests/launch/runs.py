"""A tiny training run, as a launcher starts it and as ranks of the test session do."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_taopd import cli
from tests.oracle.cases import make_pair


def make_files(root: Path) -> None:
    """A pair of models and prompts."""
    make_pair(root, "qwen3", tied_student=True)
    prompts = [{"id": f"p{i}", "prompt_tokens": [3 + i, 40 + i, 100 + i]} for i in range(10)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def words(root: Path, out: Path, *, iters: int, response: int) -> list[str]:
    """``taopd train`` on the files of ``root``: generation, selection and Adam on two replicas."""
    return [
        *("train", "--student", str(root / "student"), "--teacher", str(root / "teacher")),
        *("--prompt-data", str(root / "prompts.jsonl"), "--max-response-length", str(response)),
        *("--global-batch-size", "4", "--train-iters", str(iters), "--use-distributed-optimizer"),
        *("--lr", "1e-3", "--lr-decay-style", "cosine", "--lr-warmup-iters", "1"),
        *("--log-dir", str(out), "--export-hf", str(out / "hf")),
    ]


def run(command: list[str]) -> None:
    """Runs in each rank of a pool."""
    cli.run(command)


def metrics(out: Path) -> list[dict[str, float]]:
    """What the steps wrote so far."""
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_same_weights(one: Path, other: Path) -> None:
    """To the last bit, tensor by tensor."""
    wanted, got = load_file(one / "hf/model.safetensors"), load_file(other / "hf/model.safetensors")
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name
