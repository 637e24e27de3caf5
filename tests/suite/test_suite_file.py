"""What a suite file may say, and what is refused with a word on what to write instead."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from megatron_taopd import cli
from megatron_taopd.errors import ConfigError, TaopdError
from megatron_taopd.suite.config import read_suite
from megatron_taopd.suite.plan import Plan, Run
from megatron_taopd.suite.records import check_same
from tests.conftest import ROOT
from tests.suite.cases import write_suite


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Places alone: nothing is loaded here."""
    for name in ("teacher", "student-1", "student-2", "student-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text(name)
    for name in ("prompts", "held_out", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    return tmp_path


SWEEP = {"lr": ["1e-3", 0.01], "sweep": {"seeds": [3]}, "validation": {"rollouts": "{home}/validation.jsonl"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"sedes": [1]}, "unknown key 'sedes'; did you mean seeds?"),
    "missing": ({"seeds": None}, "seeds is missing"),
    "setting": ({"settings": {"trian-iters": 3}}, "settings: unknown key 'trian-iters'; did you mean train_iters"),
    "own setting": ({"settings": {"lr": 1}}, "lr is set by the suite for each run; write lr beside settings"),
    "selector": ({"settings": {"selector": "full"}}, "selector is what methods differ in"),
    "method": ({"methods": {"teachibility": None}}, "unknown method; did you mean teachability?"),
    "method key": ({"methods": {"full": {"supportk": 3}}}, "unknown key 'supportk'; did you mean support_k"),
    "method setting": ({"methods": {"full": {"keep_ratio": 1}}}, "write budgets beside settings, or in a method"),
    "name": ({"methods": {"a/b": {"selector": "tip"}}}, "a name is a directory, too"),
    "budget": ({"budgets": [5]}, "5 must be in (0, 1]; 0.1 keeps a tenth"),
    "budget twice": ({"budgets": [0.1, 0.1]}, "must be different shares"),
    "budget word": ({"budgets": ["5%"]}, "'5%' is not a number"),
    "budget of full": ({"methods": {"full": {"budgets": [0.1]}}}, "budgets has no effect with selector full"),
    "budgets in vain": ({"methods": {"full": None}}, "budgets has no effect: no method takes its budgets from there"),
    "no budgets": ({"budgets": None}, "teachability: no budgets; write for example budgets: [0.05, 0.1]"),
    "no lr": ({"lr": None}, "full: no learning rate"),
    "lr": ({"lr": [0.1, -1]}, "must be positive"),
    "lr of a budget": ({"methods": {"tip": {"lr": {0.2: 1}}}}, "lr names the budgets [0.2] and the budgets are [0.3]"),
    "untrained": ({"methods": {"a": {"train": False, "lr": 1}}}, "lr has no effect with train: false"),
    "seeds": ({"seeds": ["a"]}, "must be a list of whole numbers"),
    "seed twice": ({"seeds": [1, 1]}, "names a seed twice"),
    "sweep in vain": ({"sweep": {"seeds": [3]}}, "sweep has no effect, since no lr is a list"),
    "validation in vain": ({"validation": SWEEP["validation"]}, "validation has no effect"),
    "effort": (
        {**SWEEP, "methods": {"full": {"lr": [1, 2, 3]}, "tip": None}},
        "tip at 0.3 has 2 learning rates to choose from and full 3; every method gets the same effort",
    ),
    "sweep seeds": ({**SWEEP, "sweep": None}, "write sweep: {seeds: [...]}"),
    "no validation": ({**SWEEP, "validation": None}, "learning rates are not chosen on held_out"),
    "sweep by": ({**SWEEP, "sweep": {"seeds": [3], "by": "kl_froward"}}, "did you mean kl_forward?"),
    "validation is held out": (
        {**SWEEP, "validation": {"rollouts": "{home}/held_out.jsonl"}},
        "must not be chosen on what is reported",
    ),
    "measured": ({"held_out": {"rolouts": "a"}}, "unknown key 'rolouts'; did you mean rollouts?"),
    "nothing measured": ({"held_out": {"tasks": []}}, "nothing is measured"),
    "keep": ({"keep": "record"}, "'record' is none of records, exports, all; did you mean records?"),
    "baseline": ({"baseline": "ful"}, "'ful' is none of the methods; did you mean full?"),
    "no file": ({"held_out": {"rollouts": "{home}/no.jsonl"}}, "no.jsonl is no file"),
    "no prompts": ({"settings": {"prompt-data": "{home}/no.jsonl"}}, "prompt_data {home}/no.jsonl is no file"),
    "no student": ({"seeds": [1, 4]}, "full lr 0.01 seed 4: student {home}/student-4 is no directory"),
    "no model": ({"settings": {"student": "{home}"}}, "{home} has neither config.json (an HF directory) nor"),
    "no teacher": ({"settings": {"teacher": "{home}/no"}}, "teacher {home}/no is no directory"),
    "combination": ({"settings": {"loss": "jsd", "loss-support": "union"}}, "full: taopd train refuses these settings"),
}


def filled(value: Any, home: Path) -> Any:
    if isinstance(value, dict):
        return {key: filled(item, home) for key, item in value.items()}
    return value.replace("{home}", str(home)) if isinstance(value, str) else value


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_run(name: str, home: Path) -> None:
    changes, message = REFUSED[name]
    suite = write_suite(home / "suite.yaml", home, **filled(changes, home))
    with pytest.raises(TaopdError) as refusal:
        Plan(read_suite(suite), home / "out").check()
    assert message.replace("{home}", str(home)) in str(refusal.value)
    assert not (home / "out").exists()


def test_a_copy_of_the_held_out_set_is_no_validation_set(home: Path) -> None:
    (home / "copy.jsonl").write_text((home / "held_out.jsonl").read_text())
    changes = {**SWEEP, "validation": {"rollouts": str(home / "copy.jsonl")}}
    with pytest.raises(ConfigError, match="must not be chosen on what is reported"):
        read_suite(write_suite(home / "suite.yaml", home, **changes))


def test_every_run_has_its_settings(home: Path) -> None:
    """Budgets, rates of a budget, seeds' own students, variants of a selector, and a student that is not trained."""
    methods = {
        "full": {"lr": [1, 2]},
        "raw": {"selector": "teachability", "compatibility-scale": "raw", "lr": {0.01: [3, 4], 0.5: [5, 6]}},
        "prefix": {"budgets": [0.5], "lr": [7, 8]},
        "untrained": {"train": False},
    }
    changes = filled({**SWEEP, "methods": methods, "budgets": [0.01, 0.5], "seeds": [1, 2]}, home)
    plan = Plan(read_suite(write_suite(home / "suite.yaml", home, settings={"save-interval": 2}, **changes)), "out")
    plan.check()
    assert [cell.key for cell in plan.cells] == [
        ("full", None),
        ("raw", 0.01),
        ("raw", 0.5),
        ("prefix", 0.5),
        ("untrained", None),
    ]
    assert [run.id for run in plan.sweep_runs()] == [
        *("full/lr-1/seed-3", "full/lr-2/seed-3"),
        *("raw/budget-0.01/lr-3/seed-3", "raw/budget-0.01/lr-4/seed-3"),
        *("raw/budget-0.5/lr-5/seed-3", "raw/budget-0.5/lr-6/seed-3"),
        *("prefix/budget-0.5/lr-7/seed-3", "prefix/budget-0.5/lr-8/seed-3"),
    ]
    run = Run(plan.cells[1], 4.0, 2)
    config = plan.config(run)
    assert (config.selection.selector, config.selection.compatibility_scale) == ("teachability", "raw")
    assert (config.selection.keep_ratio, config.optimization.lr, config.seed) == (0.01, 4.0, 2)
    assert config.models.student == str(home / "student-2")
    assert config.logging.log_dir == "out/runs/raw/budget-0.01/lr-4/seed-2"
    assert config.checkpoint.save == config.checkpoint.load == f"{config.logging.log_dir}/checkpoints"
    assert plan.config(Run(plan.cells[0], 1.0, 1)).selection.keep_ratio is None
    untrained = Run(plan.cells[4], None, 1)
    assert untrained.id == "untrained/seed-1" and plan.config(untrained).checkpoint.save is None
    # A seed that chooses rates alone never sees the held-out set; a student that is not trained chooses nothing.
    assert plan.sets_of(Run(plan.cells[0], 1.0, 3)) == ["validation"]
    assert plan.sets_of(Run(plan.cells[0], 1.0, 1)) == ["held_out"]
    assert plan.sets_of(untrained) == ["held_out"]


@pytest.mark.parametrize("name, runs", [("quick", 9 * 3 + 10 * 3), ("qwen3", 51 * 3 + 52 * 3)])
def test_examples_are_accepted(name: str, runs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rates x sweep seeds of what trains, and all rows x seeds; a method at each of five budgets, but for `full`."""
    suite = ROOT / f"examples/suite/{name}.yaml"
    plan = Plan(read_suite(suite), tmp_path)
    for cell in {cell.method.name: cell for cell in plan.cells}.values():
        plan.cell_config(cell)
    assert cli.run(["suite", "list", f"--suite={suite}", f"--out={tmp_path}"]) == 0
    assert f"> {runs} runs: {runs} to do" in capsys.readouterr().out


def test_the_quick_example_finds_what_its_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples/suite/prepare.py"), run_name="__main__")
    Plan(read_suite(ROOT / "examples/suite/quick.yaml"), "out").check()


def test_a_finished_run_of_other_settings_is_an_error_that_names_them(home: Path) -> None:
    def identity(**changes: Any) -> dict[str, Any]:
        plan = Plan(read_suite(write_suite(home / "suite.yaml", home, **changes)), home / "out")
        return plan.identity(Run(plan.cells[1], 0.01, 1))

    record = identity()
    check_same(record, identity(settings={"log-interval": 5, "save-interval": 1}), home)  # change no number
    with pytest.raises(ConfigError, match="temperature was 1.0 and is now 0.5; train_iters was 3 and is now 4"):
        check_same(record, identity(settings={"train-iters": 4, "temperature": 0.5}), home)
    (home / "prompts.jsonl").write_text("others")
    with pytest.raises(ConfigError, match="the content of prompt_data has changed"):
        check_same(record, identity(), home)
    (home / "prompts.jsonl").write_text("prompts")
    for model, what in (("student-1", "student"), ("teacher", "teacher")):
        (home / model / "model.safetensors").write_text("another")
        with pytest.raises(ConfigError, match=f"the {what} has other weights"):
            check_same(record, identity(), home)
        unknown = {key: value for key, value in record.items() if key != "models"}  # of a version that knew no models
        check_same(unknown, identity(), home)
        (home / model / "model.safetensors").write_text(model)
    check_same(record, identity(), home)
    with pytest.raises(ConfigError, match="it was not measured on held_out"):
        check_same({**record, "files": {"prompt_data": record["files"]["prompt_data"]}}, identity(), home)
