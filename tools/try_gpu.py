"""Train a pair of models of real size and random weights for some steps on this machine's GPU, beside its plan.

    python tools/try_gpu.py --out DIR [--student qwen3_0.6b] [--teacher qwen3_4b] [-- further flags of taopd train]

Sizes are those of examples/models/configs; weights are random, so responses mean nothing, and have full length. Prints
the parts of a step, tokens/s, and the most memory that tensors held beside what ``taopd plan`` says of the same flags.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from megatron_taopd import cli
from megatron_taopd.cli import parse
from megatron_taopd.training.hooks.base import Hook

if TYPE_CHECKING:
    from megatron_taopd.training.loop import Trainer

CONFIGS = Path(__file__).resolve().parent.parent / "examples/models/configs"
GIB = 2**30


def make_model(config: Path, out: Path, seed: int) -> Path:
    """An HF directory with the configuration's sizes, random bf16 weights and a stop token that no model reaches."""
    if (out / "config.json").exists():
        return out
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    settings = transformers.AutoConfig.from_pretrained(config)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    model.save_pretrained(out)
    del model
    return out


def make_prompts(path: Path, vocab: int, length: int, count: int) -> None:
    """Prompts of random ids."""
    draw = random.Random(0)
    lines = [
        {"id": f"p{i}", "prompt_tokens": [draw.randrange(100, vocab - 1000) for _ in range(length)]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class Peaks(Hook):
    """The most that tensors held, of each step."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_step(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if torch.cuda.is_available():
            self.bytes.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="models and logs; models that are there are used again")
    parser.add_argument("--student", default="qwen3_0.6b", help="a directory of examples/models/configs")
    parser.add_argument("--teacher", default="qwen3_4b")
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--response-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    args, further = parser.parse_known_args(words)
    further = [word for word in further if word != "--"]
    args.out.mkdir(parents=True, exist_ok=True)
    models = [
        make_model(CONFIGS / name, args.out / Path(name).name, seed)
        for seed, name in enumerate((args.student, args.teacher))
    ]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    vocab = json.loads((models[0] / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    prompts = args.out / "prompts.jsonl"
    make_prompts(prompts, vocab, args.prompt_length, args.batch)
    logs = args.out / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    shared = [f"--student={models[0]}", f"--teacher={models[1]}", f"--global-batch-size={args.batch}"]
    shared += [f"--micro-batch-size={args.micro_batch}", f"--max-prompt-length={args.prompt_length}"]
    shared += [f"--max-response-length={args.response_length}", f"--rollout-batch-size={args.batch}", "--bf16"]
    train = [f"--prompt-data={prompts}", f"--train-iters={args.steps}", f"--log-dir={logs}", "--keep-ratio=0.1"]

    from megatron_taopd.commands.common import ranks
    from megatron_taopd.commands.train import run_training
    from megatron_taopd.config import TrainConfig

    config = parse(TrainConfig, [*shared, *train, *further], name="train")
    peaks = Peaks()
    with ranks(config.parallel, seed=config.seed):
        run_training(config, further_hooks=[peaks])
    rows = [json.loads(line) for line in (logs / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    print("| step | rollout s | score s | train s | step s | tokens/s | peak GiB |\n|---|--:|--:|--:|--:|--:|--:|")
    for number, row in enumerate(rows):
        times = " | ".join(f"{row[f'time_{part}']:.2f}" for part in ("rollout", "score", "train", "step"))
        peak = f"{peaks.bytes[number] / GIB:.2f}" if peaks.bytes else "–"
        print(f"| {row['iteration']} | {times} | {row['tokens_per_second']:.0f} | {peak} |")
    planned = [word.replace("--max-prompt-length", "--prompt-length") for word in shared]
    cli.run(["plan", *planned, "--keep-ratio=0.1", "--num-gpus=1"])


if __name__ == "__main__":
    main(sys.argv[1:])
