"""Models, prompts and contexts of the small reproduction, made from nothing; what is there already is used again.

OUT/teacher                             learned sums to near-perfection by plain fine-tuning
OUT/base                                the students' common start: it writes the form and copies, and cannot calculate
OUT/{near,far}/student-SEED             half-trained students of the two regimes (REGIMES), fine-tuned from base
OUT/train_prompts.jsonl                 what distillation answers
OUT/{validation,heldout}_prompts.jsonl  to choose learning rates by, and to report on
OUT/{near,far}/{validation,heldout}.jsonl   the untouched students' responses to those: contexts that stay the same

Run it from the root of the repository:
    python examples/reproduce_small/prepare.py --out build/reproduce_small
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from sft import accuracy_by_kind, batches, fine_tune, make_model
from task import problems, response_length, save_tokenizer

from megatron_taopd.cli import run


@dataclass(frozen=True)
class Sizes:
    """How large everything is. The steps of base and students are the most; they end when they know enough."""

    num_terms: int = 33
    batch_size: int = 16
    teacher_size: int = 64
    teacher_steps: int = 450
    student_size: int = 64
    base_steps: int = 600
    student_steps: int = 800
    lr: float = 5e-3
    num_train: int = 1000
    num_validation: int = 64
    num_heldout: int = 128
    contexts_per_student: int = 8

    @property
    def response_length(self) -> int:
        """Tokens of a right response: three a term, and the stop token."""
        return response_length(self.num_terms)


@dataclass(frozen=True)
class Regime:
    """How a student is half-trained."""

    silent: frozenset[str]
    """Totals that carry no loss."""
    share: float
    """Fine-tuning ends when this share of the other totals is right, given a right working so far."""


REGIMES = {
    "near": Regime(frozenset(), 0.8),  # it has seen everything, and too little of it
    "far": Regime(frozenset({"-"}), 0.95),  # it adds well, and was never told what a subtraction gives
}

TEACHER, TRAIN, VALIDATION, HELDOUT, BASE, STOP, STUDENT, CONTROL = 1, 2, 3, 4, 5, 6, 200, 400
"""Streams of problems, other random numbers in each; seeds are added to the last two."""
CALCULATED = frozenset({"+", "-"})
JUMPS = 0.15


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes ``path``: the others wait. A process that dies gives the lock back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".lock-{path.name}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make(path: Path, write: Callable[[Path], object], *, is_right: Callable[[Path], bool] = Path.exists) -> None:
    """Call ``write`` on a place aside and move the result to ``path``, unless what is there is right already.

    Any number of processes may call it at once; one of them writes.
    """
    if is_right(path):
        return
    with locked(path):
        if is_right(path):
            return  # another process made it meanwhile
        aside = path.with_name(f".partial-{path.name}")
        for old in (aside, path):
            if old.is_dir():
                shutil.rmtree(old)
        started = time.perf_counter()
        write(aside)
        aside.rename(path)
    print(f"{path}: made in {time.perf_counter() - started:.0f} s", flush=True)


def workings(stream: int, sizes: Sizes, silent: frozenset[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches to fine-tune on; kinds of words in ``silent`` carry no loss, nor does an arbitrary total."""
    source = problems(stream, sizes.num_terms)
    silent = silent | {"jump"}
    return batches(source, sizes.batch_size, silent=silent, jump=JUMPS, chooser=random.Random(stream))


def load(path: Path) -> Any:
    """A model, in fp32."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def save(model: Any, path: Path) -> None:
    """An HF directory with its tokenizer."""
    model.save_pretrained(path)
    save_tokenizer(path)


def write_teacher(path: Path, sizes: Sizes) -> None:
    """Fine-tune the teacher from random weights."""
    model = make_model(hidden_size=sizes.teacher_size, num_layers=2, num_heads=4, seed=TEACHER)
    fine_tune(
        model, workings(TEACHER, sizes, frozenset()), steps=sizes.teacher_steps, lr=sizes.lr, warmup=50, decay=True
    )
    tell("teacher", model, sizes)
    save(model, path)


def write_base(path: Path, sizes: Sizes) -> None:
    """Fine-tune from random weights on everything but the totals, until terms are copied."""
    model = make_model(hidden_size=sizes.student_size, num_layers=2, num_heads=4, seed=BASE)
    steps = fine_tune(
        model,
        workings(BASE, sizes, CALCULATED),
        steps=sizes.base_steps,
        lr=sizes.lr,
        warmup=50,
        until=lambda: accuracy_by_kind(model, problems(STOP, sizes.num_terms), 20)["term"] >= 0.995,
    )
    tell(f"base after {steps} steps", model, sizes)
    save(model, path)


def write_student(path: Path, base: Path, sizes: Sizes, *, regime: str, seed: int) -> None:
    """Fine-tune the base, and stop early."""
    model = load(base)
    silent, share = REGIMES[regime].silent, REGIMES[regime].share
    heard = CALCULATED - silent

    def is_enough() -> bool:
        known = accuracy_by_kind(model, problems(STOP, sizes.num_terms), 20)
        return sum(known[kind] for kind in heard) / len(heard) >= share

    data = workings(STUDENT + seed, sizes, silent)
    steps = fine_tune(model, data, steps=sizes.student_steps, lr=sizes.lr, warmup=10, until=is_enough)
    tell(f"{regime} student {seed} after {steps} steps", model, sizes)
    save(model, path)


def tell(name: str, model: Any, sizes: Sizes) -> None:
    """Print what a model knows, given a right working so far."""
    known = accuracy_by_kind(model, problems(VALIDATION, sizes.num_terms), 20)
    print(f"{name}:", ", ".join(f"{kind} {share:.3f}" for kind, share in known.items()), flush=True)


def write_prompts(path: Path, stream: int, count: int, sizes: Sizes) -> None:
    """A prompt file."""
    lines = [
        {"id": f"{stream}-{index:04d}", "prompt": problem.prompt, "answer": problem.answer}
        for index, problem in enumerate(islice(problems(stream, sizes.num_terms), count))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_contexts(path: Path, prompts: Path, students: Sequence[Path], sizes: Sizes) -> None:
    """Sampled responses of the students, each to prompts of its own."""
    lines = prompts.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = []
    for index, student in enumerate(students):
        given = path.with_name(f"{path.name}-prompts-{index}.jsonl")
        answers = path.with_name(f"{path.name}-answers-{index}.jsonl")
        first = index * sizes.contexts_per_student
        given.write_text("".join(lines[first : first + sizes.contexts_per_student]), encoding="utf-8")
        run(
            ["rollout", "--student", str(student), "--prompt-data", str(given), "--output", str(answers)]
            + ["--max-response-length", str(sizes.response_length), "--seed", str(index)]
        )
        parts.append(answers.read_text(encoding="utf-8"))
        given.unlink()
        answers.unlink()
    path.write_text("".join(parts), encoding="utf-8")


def prepare(out: Path, sizes: Sizes, seeds: Sequence[int], regimes: Sequence[str]) -> None:
    """Make everything that is not there."""
    make(out / "teacher", partial(write_teacher, sizes=sizes))
    make(out / "base", partial(write_base, sizes=sizes))
    for name, stream, count in (
        ("train", TRAIN, sizes.num_train),
        ("validation", VALIDATION, sizes.num_validation),
        ("heldout", HELDOUT, sizes.num_heldout),
    ):
        make(out / f"{name}_prompts.jsonl", partial(write_prompts, stream=stream, count=count, sizes=sizes))
    for regime in regimes:
        students = [out / regime / f"student-{seed}" for seed in seeds]
        for seed, student in zip(seeds, students, strict=True):
            make(student, partial(write_student, base=out / "base", sizes=sizes, regime=regime, seed=seed))
        for name in ("validation", "heldout"):
            write = partial(write_contexts, prompts=out / f"{name}_prompts.jsonl", students=students, sizes=sizes)
            make(out / regime / f"{name}.jsonl", write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/reproduce_small"), help="everything is written here")
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=list(REGIMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of the students")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prepare(args.out, Sizes(), args.seeds, args.regimes)


if __name__ == "__main__":
    main()
