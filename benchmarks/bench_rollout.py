"""Generated tokens a second: the rollout engine against transformers' ``generate``.

Same weights (fp32), same prompts of unequal length, plain sampling, one process with one thread; the two take turns.
CPU time is the process's own and little disturbed by neighbours; the ratio is of tokens per second of CPU time.

    OMP_NUM_THREADS=1 python benchmarks/bench_rollout.py --model HF_DIR --batch 16 --new-tokens 64
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="HF directory (default: random weights of SmolLM2-135M's shape)")
    parser.add_argument("--batch", type=int, default=16, help="responses generated together")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest response")
    parser.add_argument("--prompt-lengths", type=int, nargs=2, default=[24, 96], metavar=("MIN", "MAX"))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; the median counts")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


# name -> (samples to a prompt, stop tokens: one id in this many, or none)
CASES: dict[str, tuple[int, int | None]] = {
    "full length": (1, None),
    "early stops": (1, 50),
    "4 samples a prompt": (4, None),
}


def write_random_model(path: Path) -> None:
    """Random weights in SmolLM2's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMOLLM2)).save_pretrained(path)


def make_prompts(args: argparse.Namespace, samples: int, vocab_size: int) -> list[list[int]]:
    """Token ids; lengths are spread evenly over --prompt-lengths, each prompt comes ``samples`` times."""
    generator = torch.Generator().manual_seed(1)
    low, high = args.prompt_lengths
    count = -(-args.batch // samples)
    lengths = [low + round((high - low) * i / max(count - 1, 1)) for i in range(count)]
    order = torch.randperm(count, generator=generator).tolist()
    drawn = [torch.randint(vocab_size, (lengths[i],), generator=generator).tolist() for i in order]
    return [tokens for tokens in drawn for _ in range(samples)][: args.batch]


def ours(path: Path, args: argparse.Namespace) -> Callable[..., int]:
    """The engine on a student loaded from ``path``."""
    from megatron_taopd.data.prompts import Prompt
    from megatron_taopd.models import load_model
    from megatron_taopd.platform import distributed
    from megatron_taopd.platform.layout import ParallelConfig
    from megatron_taopd.rollout.config import RolloutConfig
    from megatron_taopd.rollout.megatron import MegatronEngine

    distributed.initialize(ParallelConfig(), seed=1)
    student = load_model(path, ParallelConfig(), params_dtype=torch.float32, trainable=True)

    @functools.cache
    def engine(samples: int, stop_tokens: tuple[int, ...]) -> MegatronEngine:
        loaded = replace(student, hf=replace(student.hf, eos_token_ids=stop_tokens))
        config = RolloutConfig(max_response_length=args.new_tokens, num_samples_per_prompt=samples)
        return MegatronEngine(loaded, config, seed=1)

    def run(prompts: list[list[int]], samples: int, stop_tokens: tuple[int, ...], step: int) -> int:
        asked = [Prompt(id=str(i // samples), tokens=tokens) for i, tokens in enumerate(prompts)]
        answers = engine(samples, stop_tokens).generate(asked, step=step, sample_offset=0)
        return sum(len(answer.response_tokens) for answer in answers)

    return run


def theirs(path: Path, args: argparse.Namespace) -> Callable[..., int]:
    """transformers on the same weights: prompts padded on the left, as its documentation asks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def run(prompts: list[list[int]], samples: int, stop_tokens: tuple[int, ...], step: int) -> int:
        torch.manual_seed(step)
        unique = prompts[::samples]
        longest = max(map(len, unique))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in unique])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in unique])
        answer = model.generate(
            tokens,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=args.new_tokens,
            num_return_sequences=samples,
            eos_token_id=list(stop_tokens) or None,
            pad_token_id=0,
        )[: len(prompts), longest:]
        stopped = torch.isin(answer, torch.tensor(list(stop_tokens), dtype=torch.int64))
        # A response counts up to its stop token, what comes after is padding.
        return int((stopped.cumsum(1) - stopped.int() == 0).sum())

    model.generation_config.eos_token_id = None
    return run


def measure(run: Callable[..., int], *case: Any) -> dict[str, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = run(*case)
    return {"tokens": tokens, "cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def compare(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a case: tokens per second of both, and the ratios."""
    sides = {"ours": ours(path, args), "transformers": theirs(path, args)}
    vocab_size = json.loads((path / "config.json").read_text())["vocab_size"]
    rows = []
    for name in args.cases:
        samples, one_in = CASES[name]
        stop_tokens = tuple(range(7, vocab_size, one_in)) if one_in else ()
        prompts = make_prompts(args, samples, vocab_size)
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        sides["ours"](prompts[:1], samples, stop_tokens, 0)  # an engine reads its tokenizer once
        for step in range(args.repeats):
            for side, run in sides.items():
                runs[side].append(measure(run, prompts, samples, stop_tokens, step))
                print(f"{name}: {side}: {runs[side][-1]}", file=sys.stderr, flush=True)
        row: dict[str, Any] = {"case": name, "prompt_tokens": sum(map(len, prompts))}
        for clock in ("cpu", "wall"):
            for side, done in runs.items():
                row[f"{side}_{clock}"] = statistics.median(r["tokens"] / r[clock] for r in done)
            row[f"ratio_{clock}"] = row[f"ours_{clock}"] / row[f"transformers_{clock}"]
        row["tokens"] = {side: [int(r["tokens"]) for r in done] for side, done in runs.items()}
        rows.append(row)
    return rows


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as aside:
        path = args.model
        if path is None:
            path = Path(aside)
            write_random_model(path)
        rows = compare(path, args)
    print("| case | ours, tokens/s CPU (wall) | transformers | ratio CPU (wall) |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['case']} | {row['ours_cpu']:.1f} ({row['ours_wall']:.1f}) | "
            f"{row['transformers_cpu']:.1f} ({row['transformers_wall']:.1f}) | "
            f"{row['ratio_cpu']:.2f} ({row['ratio_wall']:.2f}) |"
        )
    if args.json is not None:
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
