"""One side of bench_step.py on one rank: trains as told and writes what each step took. Not called by hand.

torchrun --nproc-per-node N benchmarks/step_runs.py SETTINGS.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch


class StepClock:
    """Seconds of each step and of its parts, wall and CPU."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._parts: dict[str, float] = {}

    def begin(self) -> None:
        self._parts = {}
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def end(self, **figures: float) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.steps.append({"wall": wall, "cpu": cpu, **self._parts, **figures})

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, whose seconds count as a part of the step."""

        def run(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                for clock, seconds in (("wall", time.perf_counter() - wall), ("cpu", time.process_time() - cpu)):
                    self._parts[f"{name}_{clock}"] = self._parts.get(f"{name}_{clock}", 0.0) + seconds

        return run


def ours(settings: dict[str, Any], clock: StepClock) -> None:
    """``taopd train``, its trainer's steps timed."""
    from megatron_taopd.commands.train import train
    from megatron_taopd.training import loop

    whole_step = loop.Trainer.step

    def timed_step(trainer: Any) -> dict[str, float]:
        clock.begin()
        metrics = whole_step(trainer)
        clock.end(
            tokens=metrics["num_valid_tokens"],
            kept=metrics["num_kept_tokens"],
            **{f"{part}_wall": metrics[f"time_{part}"] for part in ("rollout", "score", "train")},
        )
        return metrics

    loop.Trainer.step = timed_step
    batch, ranks = settings["batch"], settings["processes"]
    words = {
        "student": settings["student"],
        "teacher": settings["teacher"],
        "prompt-data": settings["prompts"],
        "max-response-length": settings["response_length"],
        "global-batch-size": batch,
        "micro-batch-size": batch // ranks,
        "train-iters": settings["steps"],
        "lr": settings["lr"],
    }
    flags = [part for name, value in words.items() for part in (f"--{name}", str(value))]
    train([*flags, *settings["flags"]])


def trl(settings: dict[str, Any], clock: StepClock) -> None:
    """TRL's trainer on the same prompts: reverse KL on its own samples at temperature 1, AdamW in fp32."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    length = settings["response_length"]
    shared = {
        "output_dir": settings["scratch"],
        "per_device_train_batch_size": settings["batch"] // settings["processes"],
        "max_steps": settings["steps"],
        "learning_rate": settings["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "temperature": 1.0,
        "beta": 1.0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }
    conversations = [json.loads(line)["messages"] for line in Path(settings["prompts"]).read_text().splitlines()]
    if settings["side"] == "TRL GKDTrainer":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        config: Any = GKDConfig(**shared, lmbda=1.0, max_new_tokens=length, max_length=1024)
        # Its collator wants an answer, which lmbda 1 never reads.
        rows = [{"messages": [*messages, {"role": "assistant", "content": "-"}]} for messages in conversations]
        trainer_class: Any = GKDTrainer
    else:
        from trl import DistillationConfig, DistillationTrainer

        config = DistillationConfig(**shared, max_completion_length=length)
        rows = [{"prompt": messages} for messages in conversations]
        trainer_class = DistillationTrainer
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(settings[name], dtype=torch.float32) for name in ("student", "teacher")
    )

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end(tokens=float(settings["batch"] * length))

    generate = student.generate

    def full_length(*args: Any, **kwargs: Any) -> Any:
        answer = generate(*args, **kwargs)
        sequences = answer if isinstance(answer, torch.Tensor) else answer.sequences
        prompts = kwargs["input_ids"]
        made = sequences.shape[1] - prompts.shape[1]
        assert made == length, f"{made} tokens generated instead of {length}: a stop token was drawn"
        return answer

    student.generate = clock.timed("rollout", full_length)
    trainer = trainer_class(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["student"]),
        callbacks=[Clock()],
    )
    trainer.train()


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(settings["threads"])
    clock = StepClock()
    (ours if settings["side"].startswith("ours") else trl)(settings, clock)
    rank = int(os.environ.get("RANK", 0))
    answer = {"steps": clock.steps, "peak_bytes": common.resident_bytes("VmHWM")}
    Path(settings["scratch"], f"rank{rank}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
