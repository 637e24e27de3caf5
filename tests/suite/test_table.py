"""Intervals, choice of learning rates, and tables from records."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from megatron_taopd.errors import ConfigError
from megatron_taopd.suite.config import read_suite
from megatron_taopd.suite.intervals import mean_interval, paired_interval
from megatron_taopd.suite.plan import Plan, Run
from megatron_taopd.suite.states import run_states
from megatron_taopd.suite.sweep import choose
from megatron_taopd.suite.table import build_table
from megatron_taopd.suite.writing import as_csv, as_markdown
from tests.suite.cases import write_suite


def test_interval_by_hand_and_by_scipy() -> None:
    values = [1.0, 2.0, 3.0, 4.0]
    found = mean_interval(values)
    # sd = sqrt(5/3); t(0.975; 3) = 3.182446 from any table; 3.182446 * 1.290994 / 2 = 2.054260
    assert (found["n"], found["mean"]) == (4, 2.5)
    assert found["sd"] == pytest.approx(math.sqrt(5 / 3)) and found["half_width"] == pytest.approx(2.054260, rel=1e-6)
    low, high = scipy.stats.t.interval(0.95, 3, loc=2.5, scale=scipy.stats.sem(values))
    assert (2.5 - found["half_width"], 2.5 + found["half_width"]) == pytest.approx((low, high))
    assert mean_interval([7.0]) == {"n": 1, "mean": 7.0, "sd": None, "half_width": None}
    assert mean_interval([]) == {"n": 0, "mean": None, "sd": None, "half_width": None}


def test_differences_are_of_the_same_seeds() -> None:
    found = paired_interval({1: 5.0, 2: 7.0, 3: 100.0}, {2: 4.0, 1: 3.0, 4: 0.0})
    assert (found["n"], found["mean"]) == (2, 2.5)
    assert found["half_width"] == pytest.approx(12.7062047 * math.sqrt(0.5) / math.sqrt(2))  # t(0.975; 1)


def record(run: Run, held_out: float | None, *, validation: float | None = None, tokens: int = 100) -> dict[str, Any]:
    training = {"tokens_supervised": tokens, "keep_ratio": 0.3, "wall_time": 2.0, "C_q05": 0.9, "low_C_share": 0.0}
    measured = {"held_out": {"kl_forward": held_out, "accuracy": 0.5, "accuracy/sums": 0.5, "num_tokens": 7}}
    return {
        "status": "finished",
        "measured": {**measured, "validation": {"kl_forward": validation}},
        "training": training if run.cell.method.trains else None,
        "peak_memory_bytes": 2**30,
    }


@pytest.fixture
def swept(tmp_path: Path) -> Plan:
    suite = write_suite(
        tmp_path / "suite.yaml",
        tmp_path,
        methods={"full": None, "tip": None},
        lr=[0.1, 0.2, 0.4],
        sweep={"seeds": [8, 9]},
        validation={"rollouts": "v.jsonl"},
    )
    return Plan(read_suite(suite), tmp_path)


def test_the_best_rate_on_the_validation_set_is_chosen(swept: Plan) -> None:
    full, tip = swept.cells
    values = {0.1: (3.0, 1.0), 0.2: (1.9, 1.9), 0.4: (2.5, 2.5)}  # means 2.0, 1.9, 2.5; the held-out set says 0.1
    records: dict[Run, dict[str, Any]] = {
        Run(full, rate, seed): record(Run(full, rate, seed), 0.0 if rate == 0.1 else 9.0, validation=value)
        for rate, pair in values.items()
        for seed, value in zip((8, 9), pair, strict=True)
    }
    found = choose(swept, full, records.get)
    assert found is not None and (found.rate, found.at_edge) == (0.2, False)
    assert [c["mean"] for c in found.candidates] == [2.0, 1.9, 2.5]
    assert choose(swept, tip, records.get) is None, "its runs have not ended"

    records[Run(full, 0.2, 9)] = {"status": "failed", "error": "out of memory"}
    found = choose(swept, full, records.get)
    assert found is not None and (found.rate, found.at_edge) == (0.1, True)
    assert found.candidates[1] == {"lr": 0.2, "mean": None, "seeds": 2, "failed": 1}
    for rate in (0.1, 0.4):  # a divergence that is not finite is written as null
        records[Run(full, rate, 8)] = record(Run(full, rate, 8), 1.0, validation=None)
    found = choose(swept, full, records.get)
    assert found is not None and found.rate is None
    table = build_table(swept, records.get)
    # Of tip six sweep runs and two seeds are to come; of full, whose rates all failed, nothing.
    assert table["runs"] == {"finished": 5, "failed": 1, "missing": 6 + 2}
    assert "full: no learning rate of the sweep finished" in as_markdown(table)


def test_candidates_with_failed_runs_are_named(swept: Plan) -> None:
    full = swept.cells[0]
    records: dict[Run, dict[str, Any]] = {
        run: record(run, 1.0, validation=1.0) for rate in full.rates for run in [Run(full, rate, 8), Run(full, rate, 9)]
    }
    records[Run(full, 0.4, 8)] = {"status": "failed", "error": "x"}
    text = as_markdown(build_table(swept, records.get))
    assert "full: learning rates of the sweep with runs that failed or were not finite: 0.4 (1 of 2 seeds)." in text


def test_a_sweeps_seed_that_is_reported_too_is_one_run(tmp_path: Path) -> None:
    """Four candidates on the seeds 1 and 2, of which the chosen one's runs are reported, and the seed 3: nine runs."""
    from megatron_taopd.suite.runner import Records

    changes: dict[str, Any] = dict(methods={"full": None}, budgets=None, lr=[0.1, 0.2, 0.4, 0.8], seeds=[1, 2, 3])
    sweep = {"seeds": [1, 2]}
    suite = write_suite(tmp_path / "suite.yaml", tmp_path, sweep=sweep, validation={"rollouts": "v.jsonl"}, **changes)
    plan = Plan(read_suite(suite), tmp_path)
    states = [name for name, _ in run_states(plan)]
    assert len(states) == 9 and states[-1] == "full/lr-?/seed-3"
    pending, waiting = Records(plan).left()
    assert (len(pending), waiting) == (8, 1)
    assert build_table(plan, lambda run: None)["runs"]["missing"] == 9


def test_more_accuracy_is_better_and_equal_rates_give_the_smaller(tmp_path: Path) -> None:
    sweep = {"seeds": [8], "by": "accuracy"}
    changes: dict[str, Any] = dict(lr=[0.1, 0.2, 0.4], sweep=sweep, validation={"tasks": ["exact:v.jsonl"]})
    plan = Plan(read_suite(write_suite(tmp_path / "suite.yaml", tmp_path, **changes)), tmp_path)
    cell = plan.cells[0]

    def look(run: Run) -> dict[str, Any]:
        accuracy = {0.1: 0.3, 0.2: 0.6, 0.4: 0.6}[run.rate or 0.0]
        return {"status": "finished", "measured": {"validation": {"accuracy": accuracy}}}

    found = choose(plan, cell, look)
    assert found is not None and found.rate == 0.2


def test_table_from_records(tmp_path: Path) -> None:
    """Paired with the baseline of the same seeds; what failed or is missing is said."""
    methods = {"full": None, "tip": None, "untrained": {"train": False}}
    suite = write_suite(tmp_path / "suite.yaml", tmp_path, methods=methods, seeds=[1, 2, 3], budgets=[0.05])
    plan = Plan(read_suite(suite), tmp_path)
    full, tip, untrained = plan.cells
    kl = {full: {1: 1.0, 2: 2.0, 3: 3.0}, tip: {1: 1.5, 2: 2.7}, untrained: {1: 4.0, 2: 4.0, 3: None}}
    records: dict[Run, dict[str, Any]] = {}
    for cell, values in kl.items():
        for seed, value in values.items():
            run = Run(cell, None if cell is untrained else 0.01, seed)
            records[run] = record(run, value, tokens=100 * seed)
    records[Run(tip, 0.01, 3)] = {"status": "failed", "error": "x"}
    table = build_table(plan, records.get)

    rows = {row["method"]: row for row in table["rows"]}
    assert table["runs"] == {"finished": 8, "failed": 1, "missing": 0}
    assert list(table["measures"])[:3] == ["accuracy", "accuracy/sums", "kl_forward"]
    assert rows["tip"]["seeds"] == [1, 2] and rows["tip"]["failed"] == [3] and rows["tip"]["baseline"] == ["full", None]
    measure = rows["tip"]["measures"]["kl_forward"]
    assert measure["values"] == {1: 1.5, 2: 2.7} and measure["mean"] == pytest.approx(2.1)
    versus = measure["versus_baseline"]
    assert (versus["n"], versus["mean"]) == (2, pytest.approx(0.6))
    test = scipy.stats.ttest_rel([1.5, 2.7], [1.0, 2.0]).confidence_interval(0.95)
    assert (versus["mean"] - versus["half_width"], versus["mean"] + versus["half_width"]) == pytest.approx(tuple(test))
    assert rows["untrained"]["measures"]["kl_forward"]["n"] == 2, "a value that is not finite is no value"
    assert rows["untrained"]["measures"]["tokens_supervised"]["n"] == 0
    assert rows["full"]["measures"]["kl_forward"]["versus_baseline"] is None

    lines = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [line["method"] for line in lines] == ["full", "tip", "untrained"]
    assert float(lines[1]["kl_forward"]) == pytest.approx(2.1) and lines[1]["failed"] == "1"
    assert float(lines[1]["kl_forward_minus_baseline"]) == pytest.approx(0.6)
    text = as_markdown(table).splitlines()
    tip_line = next(line for line in text if line.startswith("| tip"))
    assert tip_line.split(" | ")[:7] == [
        "| tip",
        "5 %",
        "0.01",
        "2",
        "2.1000 ± 7.6237",
        "+0.6000 ± 1.2706",
        "50.0 ± 0.0",
    ]
    head = next(line for line in text if line.startswith("| method")).split(" | ")
    cell = dict(zip(head, tip_line.split(" | "), strict=True))
    assert cell["5 % quantile of C in training"] == "0.9000 ± 0.0000"
    assert cell["positions with C below 0.5 in training (%)"] == "0.00 ± 0.00"
    assert cell["share of tokens supervised (%)"] == "30.00 ± 0.00"
    untrained_line = next(line for line in text if line.startswith("| untrained"))
    assert dict(zip(head, untrained_line.split(" | "), strict=True))["share of tokens supervised (%)"] == "–"
    assert "tip at 5 %: failed with the seeds 3." in text

    other = build_table(Plan(read_suite(suite).with_baseline("tip"), tmp_path), records.get)
    rows = {row["method"]: row for row in other["rows"]}
    assert rows["full"]["baseline"] == ["tip", 0.05] and rows["tip"]["baseline"] is None
    assert rows["full"]["measures"]["kl_forward"]["versus_baseline"]["mean"] == pytest.approx(-0.6)
    with pytest.raises(ConfigError, match="'ful' is none of the methods.*full"):
        read_suite(suite).with_baseline("ful")
