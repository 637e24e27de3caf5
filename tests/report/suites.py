"""A suite's directory with invented numbers: the table is built by the suite's own code, no model is trained."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from megatron_taopd.suite.config import read_suite
from megatron_taopd.suite.plan import HELD_OUT, VALIDATION, Plan, Run
from megatron_taopd.suite.records import FORMAT, write_json, write_text
from megatron_taopd.suite.table import build_table
from megatron_taopd.suite.writing import write_table

SUITE = """\
# <script>alert(1)</script> in a comment
settings: {student: s, teacher: t, prompt_data: p.jsonl, train_iters: 40}
methods:
  untrained: {train: false}
  full: {}
  teachability: {}
  teachability_raw: {selector: teachability, compatibility_scale: raw}
  entropy: {}
  tip: {}
  divergence: {}
  random: {}
  incompatible: {}
budgets: [0.05, 0.1]
lr: [1.0e-4, 3.0e-4, 1.0e-3]
seeds: [1, 2, 3, 4, 5]
sweep: {seeds: [11, 12], by: kl_forward}
validation: {rollouts: validation.jsonl}
held_out: {rollouts: heldout.jsonl, tasks: ["chain_sum"]}
"""


def make_suite(directory: Path, *, iterations: int = 40) -> Plan:
    """Write a finished suite of which one run failed and one is missing."""
    write_text(directory / "suite.yaml", SUITE)
    plan = Plan(read_suite(directory / "suite.yaml"), directory)
    records: dict[Run, dict[str, Any]] = {}

    def add(run: Run) -> None:
        records.setdefault(run, make_record(plan, run))

    for run in plan.sweep_runs():
        add(run)
    from megatron_taopd.suite.sweep import chosen_rates

    for run in plan.main_runs(chosen_rates(plan, records.get)):
        add(run)
    missing = next(run for run in records if run.cell.method.name == "tip" and run.seed == 3)
    failed = next(run for run in records if run.cell.method.name == "random" and run.seed == 5)
    del records[missing]
    records[failed] = {**records[failed], "status": "failed", "measured": {}}
    for run, record in records.items():
        write_json(plan.directory(run) / "record.json", record)
        if record["status"] == "finished" and run.cell.method.trains and run.seed < 10:
            _write_metrics(plan, run, iterations)
    write_table(build_table(plan, records.get), directory)
    return plan


def make_record(plan: Plan, run: Run) -> dict[str, Any]:
    """A record with numbers that follow from the run's name."""
    draw = random.Random(str(run))
    name, budget = run.cell.method.name, run.cell.budget
    kl = 0.9 if name == "untrained" else 0.3 + 0.05 * draw.random()
    kl += {"incompatible": 0.1, "random": 0.04, "full": -0.05}.get(name, 0.0) + (0.02 if budget == 0.05 else 0.0)
    kl += 0.1 * abs((run.rate or 3e-4) - 3e-4) / 1e-3
    measured = {"kl_forward": kl, "kl_reverse": 1.2 * kl, "mean_C": 0.8, "low_C_share": 0.1, "num_tokens": 1000}
    tasks = {"accuracy": 1 - kl, "accuracy/chain_sum": 1 - kl}
    training = {"tokens_supervised": 5000.0, "keep_ratio": budget or 1.0, "wall_time": 100 + 9 * draw.random()}
    return {
        "format": FORMAT,
        "status": "finished",
        "method": name,
        "budget": budget,
        "lr": run.rate,
        "seed": run.seed,
        "trains": run.cell.method.trains,
        "host": "<b>host</b>",
        "versions": {"megatron_taopd": "0.1.0", "torch": "2.13.0"},
        "measured": {HELD_OUT: {**measured, **tasks}, VALIDATION: measured},
        "training": {**training, "C_q05": 0.4, "low_C_share": 0.1} if run.cell.method.trains else None,
        "peak_memory_bytes": 3 * 2**30,
    }


def _write_metrics(plan: Plan, run: Run, iterations: int) -> None:
    draw = random.Random(str(run))
    lines = [
        {"iteration": i, "kl_forward": 0.9 / (1 + 0.05 * i) + 0.05 * draw.random(), "grad_norm": 1 + draw.random()}
        for i in range(1, iterations + 1)
    ]
    directory = plan.directory(run)
    write_text(directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_text(directory / "config.yaml", "student: s\n")
