"""Tiny random models for quick.yaml: a teacher, a student for each seed, prompts and contexts; some seconds.

    python examples/suite/prepare.py
    taopd suite run --suite examples/suite/quick.yaml --out build/suite_quick/suite

They show how a suite works. Which selector is better, random models cannot tell: see docs/reproduction.md.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from megatron_taopd.testing.tiny_models import save_tiny_hf_model

OUT = Path("build/suite_quick")
SEEDS = (1, 2, 3, 11)
VOCAB = 211


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    shape = dict(vocab_size=VOCAB, hidden_size=32, num_heads=2, num_kv_heads=2, ffn_size=48)
    save_tiny_hf_model(OUT / "teacher", "qwen3", num_layers=2, seed=0, **shape)
    for seed in SEEDS:
        save_tiny_hf_model(OUT / f"student-{seed}", "qwen3", num_layers=1, seed=seed, **shape)

    chooser = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [chooser.randrange(3, VOCAB) for _ in range(count)]

    write_lines(OUT / "prompts.jsonl", [{"id": f"train-{i}", "prompt_tokens": tokens(8)} for i in range(64)])
    for name in ("validation", "held_out"):
        contexts = [{"id": f"{name}-{i}", "prompt_tokens": tokens(8), "response_tokens": tokens(40)} for i in range(16)]
        write_lines(OUT / f"{name}.jsonl", contexts)


if __name__ == "__main__":
    main()
