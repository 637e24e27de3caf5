"""The control without distillation: each student goes on with its own fine-tuning, for as long as distillation trains.

As many steps of as many responses, the learning rates and the schedule of the suite file; the rate is chosen as the
suite does, by the mean divergence from the teacher on the validation contexts over the sweep's seeds. Writes
OUT/REGIME/control/student-SEED, which the suite measures as they are, and OUT/REGIME/control/choice.json.

    python examples/reproduce_small/control.py examples/reproduce_small/near.yaml
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import yaml
from prepare import CONTROL, REGIMES, Sizes, load, make, save, workings
from results import write_aside
from sft import fine_tune


def write_control(path: Path, student: Path, *, regime: str, seed: int, lr: float, suite: dict[str, Any]) -> None:
    """More fine-tuning of one student."""
    settings = suite["settings"]
    model = load(student)
    sizes = replace(Sizes(), batch_size=settings["global-batch-size"])
    data = workings(CONTROL + seed, sizes, REGIMES[regime].silent)
    fine_tune(model, data, steps=settings["train-iters"], lr=lr, warmup=settings["lr-warmup-iters"], decay=True)
    save(model, path)


def is_copy(path: Path, source: Path) -> bool:
    """Whether a directory has the files of another, and each with the same content."""
    names = [file.name for file in source.iterdir()]
    return filecmp.cmpfiles(source, path, names, shallow=False)[0] == names


@torch.no_grad()
def divergence(teacher: Any, student: Any, contexts: Path) -> float:
    """KL(teacher || student) in nats a response token, as `taopd score` has it."""
    total, count = 0.0, 0
    for line in contexts.read_text(encoding="utf-8").splitlines():
        rollout = json.loads(line)
        prompt, response = rollout["prompt_tokens"], rollout["response_tokens"]
        ids = torch.tensor([prompt + response])
        of_teacher, of_student = (
            model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for model in (teacher, student)
        )
        total += float((of_teacher.exp() * (of_teacher - of_student)).sum())
        count += len(response)
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path, help="suite file of a regime; its name is the regime's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    suite = yaml.safe_load(args.suite.read_text(encoding="utf-8"))
    regime = args.suite.stem
    home = Path(suite["settings"]["student"]).parent  # OUT/REGIME/student-{seed}

    def directory(lr: float, seed: int) -> Path:
        path = home / "control" / f"lr-{lr:g}" / f"student-{seed}"
        student = home / f"student-{seed}"
        make(path, lambda aside: write_control(aside, student, regime=regime, seed=seed, lr=lr, suite=suite))
        return path

    teacher = load(Path(suite["settings"]["teacher"]))
    contexts = Path(suite["validation"]["rollouts"])
    rates = [float(lr) for lr in suite["lr"]]
    means = {
        lr: mean(divergence(teacher, load(directory(lr, seed)), contexts) for seed in suite["sweep"]["seeds"])
        for lr in rates
    }
    best = min(rates, key=lambda lr: means[lr])
    choice = {"validation_kl_forward": {f"{lr:g}": value for lr, value in means.items()}, "chosen_lr": best}
    write_aside(home / "control" / "choice.json", json.dumps(choice, indent=1) + "\n")
    print(choice)
    for seed in suite["seeds"]:
        source = directory(best, seed)
        make(
            home / "control" / f"student-{seed}",
            partial(shutil.copytree, source),
            is_right=partial(is_copy, source=source),  # one of another choice is replaced
        )


if __name__ == "__main__":
    main()
