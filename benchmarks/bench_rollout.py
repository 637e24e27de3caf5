"""Generated tokens a second: the rollout engine against transformers' ``generate``.

Same weights (fp32), same prompts of unequal length, plain sampling, one process; the two take turns. Where responses
end by themselves the two sample different ones: tokens a second are compared, not seconds.

    python benchmarks/bench_rollout.py --model HF_DIR --threads 1 --clock cpu
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch

# SmolLM2-135M's.
SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
# name -> (samples to a prompt, stop tokens: one id in so many, or none)
CASES: dict[str, tuple[int, int | None]] = {
    "full length": (1, None),
    "early stops": (1, 50),
    "4 samples a prompt": (4, None),
}
Side = Callable[[list[list[int]], int, tuple[int, ...], int], int]
"""(prompts, samples to a prompt, stop tokens, number of the run) -> tokens generated."""


def parse() -> argparse.Namespace:
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument("--model", type=Path, default=None, help="HF directory; default: random, of SmolLM2's shape")
    parser.add_argument("--batch", type=int, default=16, help="responses generated together")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest response")
    parser.add_argument("--prompt-lengths", type=int, nargs=2, default=[24, 96], help="shortest and longest")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="what is compared")
    parser.add_argument("--json", type=Path, dest="out", help="the same as --out")
    return parser.parse_args()


def write_random_model(path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(path)


def make_prompts(args: argparse.Namespace, samples: int, vocab_size: int) -> list[list[int]]:
    """Random ids; lengths spread evenly, in any order; each prompt comes ``samples`` times."""
    generator = torch.Generator().manual_seed(1)
    low, high = args.prompt_lengths
    count = -(-args.batch // samples)
    lengths = [low + round((high - low) * i / max(count - 1, 1)) for i in range(count)]
    order = torch.randperm(count, generator=generator).tolist()
    drawn = [torch.randint(vocab_size, (lengths[i],), generator=generator).tolist() for i in order]
    return [tokens for tokens in drawn for _ in range(samples)][: args.batch]


def ours(path: Path, args: argparse.Namespace) -> tuple[Side, int]:
    """The engine on a student loaded from ``path``, and its vocabulary."""
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

    def run(prompts: list[list[int]], samples: int, stop_tokens: tuple[int, ...], number: int) -> int:
        asked = [Prompt(id=str(i // samples), tokens=tokens) for i, tokens in enumerate(prompts)]
        answers = engine(samples, stop_tokens).generate(asked, step=number, sample_offset=0)
        return sum(len(answer.response_tokens) for answer in answers)

    return run, student.hf.vocab_size


def theirs(path: Path, args: argparse.Namespace) -> Side:
    """transformers on the same weights: prompts padded on the left, as its documentation asks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def run(prompts: list[list[int]], samples: int, stop_tokens: tuple[int, ...], number: int) -> int:
        torch.manual_seed(number)
        unique = prompts[::samples]
        longest = max(map(len, unique))
        answer = model.generate(
            torch.tensor([[0] * (longest - len(p)) + p for p in unique]),
            attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in unique]),
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
        # A response counts up to its stop token; what comes after is padding.
        return int((stopped.cumsum(1) - stopped.int() == 0).sum())

    return run


def count(generate: Side, done: list[int], *case: Any) -> None:
    """Generate once more and note how many tokens there were."""
    done.append(generate(*case, len(done)))


def compare(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a case: tokens a second of both, of the round with the most."""
    engine, vocab_size = ours(path, args)
    sides = {"ours": engine, "transformers": theirs(path, args)}
    rows = []
    for name in args.cases:
        samples, one_in = CASES[name]
        stop_tokens = tuple(range(7, vocab_size, one_in)) if one_in else ()
        prompts = make_prompts(args, samples, vocab_size)
        tokens: dict[str, list[int]] = {side: [] for side in sides}
        contenders = {
            side: partial(count, generate, tokens[side], prompts, samples, stop_tokens)
            for side, generate in sides.items()
        }
        timings = common.time_all(contenders, rounds=args.rounds, warmups=1, budget=args.budget)
        row: dict[str, Any] = {"case": name, "batch": len(prompts), "prompt_tokens": sum(map(len, prompts))}
        for side, timing in timings.items():
            counts = tokens[side][1:]  # the first is the warm-up
            row[f"{side}_tokens"] = counts
            for clock in ("cpu", "wall"):
                row[f"{side}_{clock}"] = max(n / s for n, s in zip(counts, timing.of(clock), strict=True))
        for clock in ("cpu", "wall"):
            row[f"ratio_{clock}"] = row[f"ours_{clock}"] / row[f"transformers_{clock}"]
        rows.append(row)
    return rows


def main() -> None:
    args = parse()
    common.start(args)
    with tempfile.TemporaryDirectory() as aside:
        path = args.model
        if path is None:
            path = Path(aside)
            write_random_model(path)
        rows = compare(path, args)
    columns = {"case": "case", "batch": "responses"}
    for clock in ("cpu", "wall"):
        columns |= {
            f"ours_{clock}": f"ours, tokens/s ({clock})",
            f"transformers_{clock}": f"transformers ({clock})",
            f"ratio_{clock}": f"ratio ({clock})",
        }
    title = f"Rollout, up to {args.new_tokens} tokens to prompts of {args.prompt_lengths} tokens, fp32"
    common.finish([common.Table("rollout", title, columns, rows)], args)


if __name__ == "__main__":
    main()
