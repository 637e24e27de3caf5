"""Generated tokens a second: the rollout engine against transformers' ``generate`` and Megatron-Core's own loop.

Same weights (fp32), same prompts of unequal length, plain sampling, one process; all take turns. Where responses end by
themselves everyone samples different ones: tokens a second are compared, not seconds.

Two more tables say why: the engine with one of its measures taken back at a time, beside Megatron's loop with one of
its drawbacks taken away, and where all spend their time by kind of operation.

    python benchmarks/bench_rollout.py --model HF_DIR --threads 1 --clock cpu
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from op_kinds import seconds_by_kind, shares_row, shares_table
from rollout_sides import Responses, Side, load_student, megatron_loop, ours, transformers_generate

OURS, TRANSFORMERS, MEGATRON = "ours", "transformers", "Megatron's loop"

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


def parse() -> argparse.Namespace:
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument("--model", type=Path, default=None, help="HF directory; default: random, of SmolLM2's shape")
    parser.add_argument("--batch", type=int, default=16, help="responses generated together")
    parser.add_argument("--new-tokens", type=int, default=64, help="longest response")
    parser.add_argument("--prompt-lengths", type=int, nargs=2, default=[24, 96], help="shortest and longest")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="what is compared")
    parser.add_argument("--no-parts", action="store_true", help="without the two tables that say why")
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


def count(generate: Side, done: list[int], *case: Any) -> None:
    """Generate once more and note how many tokens there were."""
    done.append(sum(map(len, generate(*case, len(done)))))


@dataclass
class Case:
    """What is generated."""

    name: str
    prompts: list[list[int]]
    samples: int
    stop_tokens: tuple[int, ...]


def make_case(name: str, args: argparse.Namespace, vocab_size: int) -> Case:
    samples, one_in = CASES[name]
    stop_tokens = tuple(range(7, vocab_size, one_in)) if one_in else ()
    return Case(name, make_prompts(args, samples, vocab_size), samples, stop_tokens)


def speeds(contenders: dict[str, tuple[Side, Case]], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of every contender tokens a second by clock, of the round with the most; and the tokens of every round."""
    tokens: dict[str, list[int]] = {name: [] for name in contenders}
    runs = {
        name: partial(count, side, tokens[name], case.prompts, case.samples, case.stop_tokens)
        for name, (side, case) in contenders.items()
    }
    timings = common.time_all(runs, rounds=args.rounds, warmups=1, budget=args.budget)
    found: dict[str, dict[str, Any]] = {}
    for name, timing in timings.items():
        counts = tokens[name][1:]  # the first is the warm-up
        best = {c: max(n / s for n, s in zip(counts, timing.of(c), strict=True)) for c in ("cpu", "wall")}
        found[name] = {**best, "tokens": counts}
    return found


def compare(cases: list[Case], sides: dict[str, Side], args: argparse.Namespace) -> common.Table:
    """A row a case."""
    rows = []
    for case in cases:
        found = speeds({name: (side, case) for name, side in sides.items()}, args)
        row: dict[str, Any] = {
            "case": case.name,
            "batch": len(case.prompts),
            "prompt_tokens": sum(map(len, case.prompts)),
        }
        for name, speed in found.items():
            row |= {f"{name}_{key}": value for key, value in speed.items()}
        for clock in ("cpu", "wall"):
            row[f"ratio_{clock}"] = row[f"{OURS}_{clock}"] / row[f"{TRANSFORMERS}_{clock}"]
        row["ratio"] = row[f"ratio_{args.clock}"]
        rows.append(row)
    columns = {"case": "case", "batch": "responses"}
    for clock in ("cpu", "wall"):
        columns |= {f"{name}_{clock}": f"{name}, tokens/s ({clock})" for name in sides}
        columns[f"ratio_{clock}"] = f"{OURS} ÷ {TRANSFORMERS} ({clock})"
    title = f"Rollout, up to {args.new_tokens} tokens to prompts of {args.prompt_lengths} tokens, fp32"
    return common.Table("rollout", title, columns, rows)


def take_apart(cases: list[Case], sides: dict[str, Side], student: Any, args: argparse.Namespace) -> common.Table:
    """The engine without one of its measures at a time, and Megatron's loop without one of its drawbacks."""
    from rollout_ablations import ABLATIONS

    from megatron_taopd.rollout.megatron.module_state import ready_for_inference

    engine, loop = sides[OURS], sides[MEGATRON]
    rows = []
    for case in cases:
        contenders = {OURS: (engine, case)}
        for name, block in ABLATIONS.get(case.name, {}).items():
            contenders[f"{OURS}, but {name}"] = (within(block, engine), case)
        if case.samples > 1:
            apart = [[i, *prompt[1:]] for i, prompt in enumerate(case.prompts)]
            contenders[f"{OURS}, but every prompt is another"] = (engine, replace(case, prompts=apart))
        if case.name in ABLATIONS:
            contenders[MEGATRON] = (loop, case)
        if case.name == "full length":
            mean = sum(map(len, case.prompts)) // len(case.prompts)
            long = max(case.prompts, key=len)
            alike = replace(case, prompts=[long[:mean]] * len(case.prompts))
            lent = partial(ready_for_inference, torch.nn.ModuleList(student.modules))
            contenders[f"{MEGATRON}, prompts of one length"] = (loop, alike)
            contenders[f"{MEGATRON}, prompts of one length, our linear layers"] = (within(lent, loop), alike)
        found = speeds(contenders, args)
        fastest = found[OURS][args.clock]
        rows += [
            {"case": case.name, "who": name, "speed": speed[args.clock], "ratio": speed[args.clock] / fastest, **speed}
            for name, speed in found.items()
        ]
    columns = {"case": "case", "who": "who", "speed": f"tokens/s ({args.clock})", "ratio": f"÷ {OURS}"}
    return common.Table("rollout/parts", "Rollout: what each measure is worth", columns, rows)


def within(block: Callable[[], AbstractContextManager[Any]], side: Side) -> Side:
    def run(*case: Any) -> Responses:
        with block():
            return side(*case)

    return run


def profiled(case: Case, sides: dict[str, Side], args: argparse.Namespace) -> common.Table:
    rows = []
    for name, side in sides.items():
        seconds = seconds_by_kind(partial(side, case.prompts, case.samples, case.stop_tokens, 0))
        rows.append(shares_row({"who": name}, seconds))
    return shares_table("rollout/profile", f"Rollout: profile of the case {case.name}", {"who": "who"}, rows)


def main() -> None:
    args = parse()
    common.start(args)
    with tempfile.TemporaryDirectory() as aside:
        path = args.model
        if path is None:
            path = Path(aside)
            write_random_model(path)
        student = load_student(path)
        sides = {
            OURS: ours(student, args.new_tokens),
            TRANSFORMERS: transformers_generate(path, args.new_tokens),
            MEGATRON: megatron_loop(student, args.new_tokens),
        }
        cases = [make_case(name, args, student.hf.vocab_size) for name in args.cases]
        tables = [compare(cases, {name: sides[name] for name in (OURS, TRANSFORMERS)}, args)]
        if not args.no_parts:
            tables += [take_apart(cases, sides, student, args), profiled(cases[0], sides, args)]
    common.finish(tables, args)


if __name__ == "__main__":
    main()
