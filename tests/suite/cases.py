"""Tiny pairs whose students differ by seed, and suite files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from megatron_taopd import cli
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.data.tokenizers_for_tests import SPECIAL, save_word_tokenizer

VOCAB = 61
WORDS = [f"w{i}" for i in range(VOCAB - len(SPECIAL))]
SEEDS = (1, 2, 3)
SHAPE: dict[str, Any] = dict(vocab_size=VOCAB, hidden_size=16, num_heads=2, num_kv_heads=2, ffn_size=24)


def make_home(home: Path) -> None:
    """A teacher, a student a seed, prompts, and two sets of contexts."""
    save_tiny_hf_model(home / "teacher", "qwen3", num_layers=2, seed=9, **SHAPE)
    for seed in SEEDS:
        save_tiny_hf_model(home / f"student-{seed}", "qwen3", num_layers=1, seed=seed, **SHAPE)
    for model in ("teacher", *(f"student-{seed}" for seed in SEEDS)):
        save_word_tokenizer(home / model, WORDS)
    rng = random.Random(5)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(len(SPECIAL), VOCAB) for _ in range(count)]

    def write(name: str, lines: list[dict[str, Any]]) -> None:
        (home / name).write_text("".join(json.dumps({"id": str(i), **x}) + "\n" for i, x in enumerate(lines)))

    write("prompts.jsonl", [{"prompt_tokens": tokens(4)} for _ in range(12)])
    for name in ("held_out.jsonl", "validation.jsonl"):
        write(name, [{"prompt_tokens": tokens(3), "response_tokens": tokens(9 + i)} for i in range(4)])


def content(home: Path, **changes: Any) -> dict[str, Any]:
    """A suite file's content; ``settings`` among the changes are further settings, null drops a key."""
    settings = {
        "student": str(home / "student-{seed}"),
        "teacher": str(home / "teacher"),
        "prompt-data": str(home / "prompts.jsonl"),
        "max-response-length": 12,
        "global-batch-size": 4,
        "micro-batch-size": 4,
        "train-iters": 3,
        "support-k": 4,
        **changes.pop("settings", {}),
    }
    whole: dict[str, Any] = {
        "settings": settings,
        "methods": {"full": None, "teachability": None},
        "budgets": [0.3],
        "seeds": [1, 2],
        "lr": "1e-2",
        "held_out": {"rollouts": str(home / "held_out.jsonl")},
        **changes,
    }
    return {key: value for key, value in whole.items() if value is not None}


def write_suite(path: Path, home: Path, **changes: Any) -> Path:
    """Write :func:`content`."""
    path.write_text(yaml.safe_dump(content(home, **changes), sort_keys=False))
    return path


def run_suite(suite: Path, out: Path, *flags: str) -> int:
    """``taopd suite run`` in this process."""
    return cli.run(["suite", "run", f"--suite={suite}", f"--out={out}", *flags])


def table_of(out: Path) -> dict[str, Any]:
    """table.json."""
    return json.loads((out / "table.json").read_text())


def without_times(table: dict[str, Any]) -> dict[str, Any]:
    """What an interruption does not change."""
    rows = [
        {**row, "measures": {k: v for k, v in row["measures"].items() if k not in ("wall_time", "peak_memory")}}
        for row in table["rows"]
    ]
    return {"rows": rows, "sweep": table["sweep"], "runs": table["runs"]}
