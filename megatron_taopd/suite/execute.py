"""One run: train, measure, and what its record says. Process groups exist; all ranks call everything together."""

from __future__ import annotations

import contextlib
import json
import logging
import platform as machine
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_taopd import __version__
from megatron_taopd.commands.common import announce, configure_logging
from megatron_taopd.commands.train import run_training
from megatron_taopd.config import TrainConfig
from megatron_taopd.platform import distributed
from megatron_taopd.suite.contexts import measure_contexts
from megatron_taopd.suite.measured import ACCURACY
from megatron_taopd.suite.memory import PeakMemory
from megatron_taopd.suite.plan import Plan, Run
from megatron_taopd.suite.records import FORMAT
from megatron_taopd.training.hooks.base import Hook
from megatron_taopd.training.pair import ModelPair, load_pair

if TYPE_CHECKING:
    from megatron_taopd.training.loop import Trainer

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The training loop returned before the last step: it was asked to stop."""


class LastStep(Hook):
    """Holds on to the models after the last step, and knows the most memory that training took."""

    def __init__(self) -> None:
        self.memory = PeakMemory()
        self.peak: int | None = None
        self.pair: ModelPair | None = None

    def on_end(self, trainer: Trainer) -> None:
        self.peak = self.memory.read()
        self.pair = trainer.pair


def measure(plan: Plan, run: Run, pair: ModelPair, config: TrainConfig) -> dict[str, Any]:
    """Each set that the run is measured on: the measures of docs/suite.md, and the results of its tasks."""
    measured: dict[str, Any] = {}
    for name in plan.sets_of(run):
        values: dict[str, Any] = {}
        rollouts = plan.sets[name].rollouts
        if rollouts is not None:
            values |= measure_contexts(pair, config, rollouts)
            logger.info("%s: forward KL %.4f over %d tokens", name, values["kl_forward"], values["num_tokens"])
        if plan.tasks[name]:
            values |= _answer(plan, run, name, pair, config)
            logger.info("%s: accuracy %.3f", name, values[ACCURACY])
        measured[name] = values
    return measured


def _answer(plan: Plan, run: Run, name: str, pair: ModelPair, config: TrainConfig) -> dict[str, Any]:
    from megatron_taopd.evaluation.model import evaluate

    output = plan.directory(run) / name if plan.suite.keep != "records" else None
    results = evaluate(
        pair.student,
        plan.tasks[name],
        seed=run.seed,
        tokenizer=pair.tokenizer,
        rollout_batch_size=config.rollout.rollout_batch_size,
        output=output,
    )["tasks"]
    each = {f"{ACCURACY}/{task}": result["pass@1"] for task, result in results.items()}
    return {ACCURACY: sum(each.values()) / len(each), **each, "tasks": results}


def execute(plan: Plan, run: Run) -> dict[str, Any]:
    """Make one run, or continue it from its newest checkpoint, and measure it.

    Returns:
        Its record.

    Raises:
        Stopped: the loop returned early, with a checkpoint where the settings ask for some.
    """
    config = plan.config(run)
    directory = plan.directory(run)
    started, clock = time.time(), time.perf_counter()
    with _output_to(directory / "log.txt"):
        distributed.initialize(config.parallel, seed=config.seed)
        configure_logging()
        if run.cell.method.trains:
            last = LastStep()
            if not run_training(config, further_hooks=[last]):
                raise Stopped
            assert last.pair is not None, "hooks see the end"
            peak, training = last.peak, _training(directory / "metrics.jsonl", config)
            measured = measure(plan, run, last.pair, config)
        else:
            memory, training = PeakMemory(), None
            measured = measure(plan, run, _untrained(config), config)
            peak = memory.read()
    return {
        **describe(plan, run, status="finished", started=started),
        "seconds": round(time.perf_counter() - clock, 3),
        "measured": measured,
        "training": training,
        "peak_memory_bytes": peak,
    }


def describe(plan: Plan, run: Run, *, status: str, started: float) -> dict[str, Any]:
    """What every record says: which run, when, where, and from what."""
    import torch

    return {
        "format": FORMAT,
        "status": status,
        "method": run.cell.method.name,
        "budget": run.cell.budget,
        "lr": run.rate,
        "seed": run.seed,
        "trains": run.cell.method.trains,
        "started": round(started, 1),
        "host": machine.node(),
        "ranks": distributed.world_size(),
        "versions": {"megatron_taopd": __version__, "torch": torch.__version__, "python": machine.python_version()},
        **plan.identity(run),
    }


def _untrained(config: TrainConfig) -> ModelPair:
    announce(config, "taopd suite: a student as it is")
    return load_pair(
        config.models,
        config.parallel,
        config.precision,
        train_student=False,
        offload_teacher=config.scoring.offload_teacher,
        teacher_parallel=config.teacher_parallel,
        teacher_fp8=config.teacher_fp8,
    )


def _training(path: Path, config: TrainConfig) -> dict[str, Any]:
    """Sums and averages over all steps, also those before a resumption; on rank 0, which wrote them."""
    if distributed.rank() != 0:
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == config.batch.train_iters, f"{path} has {len(rows)} of {config.batch.train_iters} steps"
    return summarise(rows)


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a record keeps of metrics.jsonl."""

    def total(name: str) -> float:
        return sum(row[name] for row in rows)

    def mean(name: str) -> float | None:
        values = [row[name] for row in rows if row.get(name) is not None]
        return sum(values) / len(values) if values else None

    supervised, valid = total("num_kept_tokens"), total("num_valid_tokens")
    return {
        "iterations": len(rows),
        "tokens_valid": int(valid),
        "tokens_supervised": int(supervised),
        "keep_ratio": supervised / valid,
        "wall_time": total("time_step"),
        "iterations_skipped": int(total("skipped")),
        "response_length": mean("response_length"),
        "C_q05": mean("C_q05"),
        "low_C_share": mean("low_C_share"),
        "low_D_share": mean("low_D_share"),
        "teacher_top5_share": mean("teacher_top5_share"),
        "first": {name: rows[0].get(name) for name in ("loss", "kl_forward", "mean_C", "C_q05", "low_C_share")},
        "last": {name: rows[-1].get(name) for name in ("loss", "kl_forward", "mean_C", "C_q05", "low_C_share")},
    }


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """What a run prints goes to its own file, on rank 0 (the others print warnings alone)."""
    if distributed.rank() != 0:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield
