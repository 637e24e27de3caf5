"""Whole suites on tiny random models, in this process and in ranks that exist already."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_taopd import cli
from megatron_taopd.errors import ConfigError
from megatron_taopd.exit_status import RUN_AGAIN
from megatron_taopd.platform import distributed
from megatron_taopd.suite.config import read_suite
from megatron_taopd.suite.plan import Plan, Run
from megatron_taopd.testing import WorkerPool
from tests.oracle.reference import load_float64, read_jsonl, response_logits
from tests.suite.cases import SEEDS, VOCAB, make_home, run_suite, table_of, without_times, write_suite

METHODS: dict[str, Any] = {"full": None, "teachability": None, "untrained": {"train": False}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("suite")
    make_home(home)
    return home


@pytest.fixture(scope="module")
def straight(home: Path) -> Path:
    """A suite made in one go; its exports are kept."""
    out = home / "straight"
    suite = write_suite(home / "straight.yaml", home, methods=METHODS, keep="exports", settings={"save-interval": 1})
    assert run_suite(suite, out) == 0
    return out


def brute_force_kl(student: Path, home: Path) -> float:
    """Forward KL over the held-out contexts, by transformers in float64."""
    models = [load_float64(home / "teacher"), load_float64(student)]
    total, count = 0.0, 0
    with torch.no_grad():
        for rollout in read_jsonl(home / "held_out.jsonl"):
            log_t, log_s = (response_logits(model, rollout, VOCAB).log_softmax(-1) for model in models)
            total += float((log_t.exp() * (log_t - log_s)).sum())
            count += len(rollout["response_tokens"])
    return total / count


def test_held_out_kl_is_that_of_the_exported_student(straight: Path, home: Path) -> None:
    rows = {row["method"]: row for row in table_of(straight)["rows"]}
    directories = {
        "full": "runs/full/lr-0.01/seed-{}/hf",
        "teachability": "runs/teachability/budget-0.3/lr-0.01/seed-{}/hf",
        "untrained": "../student-{}",
    }
    wanted = {
        name: [brute_force_kl(straight / path.format(s), home) for s in (1, 2)] for name, path in directories.items()
    }
    for name, row in rows.items():
        measure = row["measures"]["kl_forward"]
        assert list(measure["values"].values()) == pytest.approx(wanted[name], rel=1e-4)
        assert measure["mean"] == pytest.approx(sum(wanted[name]) / 2, rel=1e-4)
        # t(0.975; 1) = 12.7062; of two values sd / sqrt(2) is half their distance
        assert measure["half_width"] == pytest.approx(12.7062 * abs(wanted[name][0] - wanted[name][1]) / 2, rel=1e-2)
    difference = [a - b for a, b in zip(wanted["teachability"], wanted["full"], strict=True)]
    versus = rows["teachability"]["measures"]["kl_forward"]["versus_baseline"]
    assert versus["mean"] == pytest.approx(sum(difference) / 2, rel=1e-3)
    assert all(a != b for a, b in zip(wanted["full"], wanted["untrained"], strict=True)), "training changes a student"


def test_the_quantile_of_C_is_over_all_held_out_positions(straight: Path, home: Path) -> None:
    values = []
    models = [load_float64(home / "teacher"), load_float64(home / "student-1")]
    with torch.no_grad():
        for rollout in read_jsonl(home / "held_out.jsonl"):
            p_t, p_s = (response_logits(model, rollout, VOCAB).softmax(-1) for model in models)
            values.append(p_t.gather(-1, p_s.topk(4).indices).sum(-1))
    found = json.loads((straight / "runs/untrained/seed-1/record.json").read_text())["measured"]["held_out"]
    assert found["C_q05"] == pytest.approx(float(torch.cat(values).quantile(0.05)), rel=1e-4)
    assert found["mean_C"] == pytest.approx(float(torch.cat(values).mean()), rel=1e-4)


def test_costs_are_those_of_the_metrics(straight: Path) -> None:
    rows = {row["method"]: row["measures"] for row in table_of(straight)["rows"]}
    steps = read_jsonl(straight / "runs/teachability/budget-0.3/lr-0.01/seed-2/metrics.jsonl")
    # No response is so short that its one position at least would exceed the budget.
    assert all(step["num_kept_tokens"] == math.ceil(0.3 * step["num_valid_tokens"]) for step in steps)
    cost = rows["teachability"]
    assert cost["tokens_supervised"]["values"]["2"] == sum(step["num_kept_tokens"] for step in steps)
    assert cost["wall_time"]["values"]["2"] == pytest.approx(sum(step["time_step"] for step in steps))
    assert rows["full"]["keep_ratio"]["mean"] == 1.0
    assert rows["full"]["peak_memory"]["mean"] > 50 * 2**20
    assert rows["untrained"]["tokens_supervised"]["n"] == 0


def test_only_what_is_to_be_kept_is_there(straight: Path) -> None:
    run = straight / "runs/full/lr-0.01/seed-1"
    names = {path.name for path in run.iterdir()}
    assert {"record.json", "metrics.jsonl", "config.yaml", "log.txt", "hf"} <= names
    assert "checkpoints" not in names and not any(name.startswith("claim") for name in names)


def test_finished_runs_are_not_made_again_and_the_table_needs_their_records_alone(straight: Path, home: Path) -> None:
    records = {path: path.stat().st_mtime_ns for path in straight.rglob("record.json")}
    assert len(records) == 6
    assert run_suite(home / "straight.yaml", straight) == 0
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("record.json")} == records
    bare = home / "bare"
    for path in [*records, straight / "suite.yaml"]:
        copy = bare / path.relative_to(straight)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    assert cli.run(["suite", "table", f"--out={bare}"]) == 0
    assert (bare / "table.csv").read_text() == (straight / "table.csv").read_text()
    assert cli.run(["suite", "table", f"--out={bare}", "--baseline=teachability"]) == 0
    assert "minus teachability" in (bare / "table-versus-teachability.md").read_text()
    assert (bare / "table.csv").read_text() == (straight / "table.csv").read_text()


def test_other_settings_of_a_finished_run_are_refused(straight: Path, home: Path) -> None:
    settings = {"train-iters": 4, "save-interval": 1}
    other = write_suite(home / "other.yaml", home, methods=METHODS, keep="exports", settings=settings)
    with pytest.raises(ConfigError, match="train_iters was 3 and is now 4"):
        run_suite(other, straight)


@pytest.mark.parametrize("save_interval", [1, None])
def test_interrupted_and_resumed_is_the_same_table(
    save_interval: int | None,
    straight: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """SIGTERM in the second step of the second run: it goes on from its checkpoint, or is made anew."""
    from megatron_taopd.training.hooks.metrics_file import MetricsFileHook

    on_step, calls = MetricsFileHook.on_step, 0

    def interrupt(*args: Any) -> None:
        nonlocal calls
        calls += 1
        on_step(*args)
        if calls == 3 + 2:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = {"save-interval": save_interval}
    suite = write_suite(tmp_path / "suite.yaml", home, methods=METHODS, settings=settings)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFileHook, "on_step", interrupt)
        assert run_suite(suite, tmp_path / "out") == RUN_AGAIN
    capsys.readouterr()
    assert cli.run(["suite", "list", f"--suite={suite}", f"--out={tmp_path / 'out'}"]) == 0
    states = capsys.readouterr().out
    assert "begun     teachability/budget-0.3/lr-0.01/seed-1\n" in states
    assert "> 6 runs: 1 finished, 1 begun, 4 to do" in states
    assert not list(tmp_path.rglob("claim.*"))
    assert run_suite(suite, tmp_path / "out") == 0
    run = tmp_path / "out/runs/teachability/budget-0.3/lr-0.01/seed-1"
    assert len(read_jsonl(run / "starts.jsonl")) == 2
    assert ("resumed from iteration 2" in (run / "log.txt").read_text()) == (save_interval == 1)
    assert without_times(table_of(tmp_path / "out")) == without_times(table_of(straight))


def test_a_failed_run_is_recorded_and_the_others_are_made(home: Path, tmp_path: Path) -> None:
    """A student without weights fails, with its error; it is made again on request alone."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((home / "student-1/config.json").read_text())
    methods = {"broken": {"train": False, "student": str(broken)}, "untrained": {"train": False}}
    suite = write_suite(tmp_path / "suite.yaml", home, methods=methods, budgets=None, lr=None, seeds=[1])
    out = tmp_path / "out"
    assert run_suite(suite, out) == 1
    record = json.loads((out / "runs/broken/seed-1/record.json").read_text())
    assert record["status"] == "failed" and "ModelError" in record["error"] and str(broken) in record["error"]
    assert "Traceback" in (out / "runs/broken/seed-1/error-rank0.txt").read_text()
    assert table_of(out)["runs"] == {"finished": 1, "failed": 1, "missing": 0}
    (broken / "model.safetensors").write_bytes((home / "student-1/model.safetensors").read_bytes())
    assert run_suite(suite, out) == 1, "the status is of all runs, whoever made them"
    assert table_of(out)["runs"]["failed"] == 1, "nobody asked for it"
    assert run_suite(suite, out, "--retry-failed") == 0
    rows = table_of(out)["rows"]
    assert [row["seeds"] for row in rows] == [[1], [1]]
    assert rows[0]["measures"]["kl_forward"]["mean"] == rows[1]["measures"]["kl_forward"]["mean"]


def test_an_interrupted_run_is_not_continued_with_other_settings(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its checkpoint is of another comparison: the run is made anew."""
    from megatron_taopd.training.hooks.metrics_file import MetricsFileHook

    on_step = MetricsFileHook.on_step

    def interrupt(*args: Any) -> None:
        on_step(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    changes: dict[str, Any] = dict(methods={"full": None}, budgets=None, seeds=[1])
    for style, status in (("cosine", RUN_AGAIN), ("linear", 0)):
        settings = {"save-interval": 1, "lr-decay-style": style}
        suite = write_suite(tmp_path / "suite.yaml", home, settings=settings, **changes)
        with monkeypatch.context() as patch:
            if status == RUN_AGAIN:
                patch.setattr(MetricsFileHook, "on_step", interrupt)
            assert run_suite(suite, tmp_path / "out") == status
    run = tmp_path / "out/runs/full/lr-0.01/seed-1"
    assert len(read_jsonl(run / "starts.jsonl")) == 1 and "resumed" not in (run / "log.txt").read_text()
    # Linear from 1e-2 to 0 in three steps; the cosine's second step would be made with 0.0075.
    rates = [step["learning_rate"] for step in read_jsonl(run / "metrics.jsonl")]
    assert rates == pytest.approx([0.01, 0.02 / 3, 0.01 / 3])


def share(suite: str, out: str) -> int:
    """Runs that this process made."""
    from megatron_taopd.suite.runner import Runner, start_ranks

    plan = Plan(read_suite(suite), out)
    plan.check()
    start_ranks()
    try:
        plan.load_tasks()
        runner = Runner(plan)
        assert runner.go()
        return len(runner.seconds)
    finally:
        distributed.shutdown()


def warm_up() -> None:
    """Import what runs need, so that two processes begin together."""
    importlib.import_module("megatron_taopd.suite.runner")


def test_two_processes_share_a_sweep_and_its_runs(
    home: Path, tmp_path: Path, pool: Callable[[int], WorkerPool]
) -> None:
    """Each run is made once; the rate with the smaller KL on the validation set makes the table."""
    changes: dict[str, Any] = dict(
        methods={"full": None},
        budgets=None,
        lr=["1e-3", "3e-2"],
        sweep={"seeds": [2, 3]},
        validation={"rollouts": str(home / "validation.jsonl")},
    )
    suite = write_suite(tmp_path / "suite.yaml", home, **changes)
    out = tmp_path / "out"
    pool(1).run(warm_up)
    made: list[int] = []
    other = threading.Thread(target=lambda: made.extend(pool(1).run(share, str(suite), str(out))))
    other.start()
    made.append(share(str(suite), str(out)))
    other.join()
    assert len(made) == 2 and sum(made) == 4 + 1 and min(made) >= 1  # seed 2 of the chosen rate is a sweep run, too
    for starts in out.rglob("starts.jsonl"):
        assert len(read_jsonl(starts)) == 1, starts

    records = [json.loads(path.read_text()) for path in out.rglob("record.json")]
    kl = {(r["lr"], r["seed"]): r["measured"].get("validation", {}).get("kl_forward") for r in records}
    means = {lr: (kl[lr, 2] + kl[lr, 3]) / 2 for lr in (1e-3, 3e-2)}
    best = min(means, key=lambda lr: means[lr])
    assert run_suite(suite, out) == 0
    table = table_of(out)
    assert table["rows"][0]["lr"] == best and table["rows"][0]["seeds"] == [1, 2]
    (cell,) = table["sweep"]["cells"]
    assert [c["mean"] for c in cell["candidates"]] == pytest.approx([means[1e-3], means[3e-2]])
    for record in records:
        assert ("held_out" in record["measured"]) == (record["seed"] != 3), "seed 3 chooses rates alone"


def test_two_ranks_make_the_runs_together(
    straight: Path, home: Path, tmp_path: Path, pool: Callable[[int], WorkerPool]
) -> None:
    """Data-parallel ranks find what one rank found, up to rounding."""
    changes: dict[str, Any] = dict(methods={"teachability": None}, settings={"micro-batch-size": 2})
    suite = write_suite(tmp_path / "suite.yaml", home, **changes)
    assert pool(2).run(run_suite, suite, tmp_path / "out") == [0, 0]
    (row,) = table_of(tmp_path / "out")["rows"]
    (alone,) = (row for row in table_of(straight)["rows"] if row["method"] == "teachability")
    for name in ("kl_forward", "tokens_supervised", "C_q05"):
        mine, other = (list(r["measures"][name]["values"].values()) for r in (row, alone))
        assert mine == pytest.approx(other, rel=1e-3)
    assert {json.loads(path.read_text())["ranks"] for path in tmp_path.rglob("record.json")} == {2}


def test_a_layout_that_does_not_fit_the_ranks_is_refused_at_once(home: Path, tmp_path: Path) -> None:
    settings = {"tensor-model-parallel-size": 4}
    suite = write_suite(tmp_path / "suite.yaml", home, settings=settings)
    with pytest.raises(ConfigError, match="1 ranks cannot hold whole models"):
        run_suite(suite, tmp_path / "out")
    assert not (tmp_path / "out/runs").exists()


def fail_on_one_rank(suite: Path, out: Path) -> str:
    """What a rank says when the second one failed alone."""
    from megatron_taopd.suite import runner

    execute = runner.execute

    def fail(plan: Plan, run: Run) -> dict[str, Any]:
        record = execute(plan, run)
        if distributed.rank() == 1:
            raise OSError("disk of rank 1")
        return record

    runner.execute = fail
    try:
        run_suite(suite, out)
    except runner.RanksApart as error:
        return str(error)
    finally:
        runner.execute = execute
    return ""


def test_a_failure_of_one_rank_alone_is_recorded_and_ends_all(
    home: Path, tmp_path: Path, pool: Callable[[int], WorkerPool]
) -> None:
    changes: dict[str, Any] = dict(methods={"untrained": {"train": False}}, budgets=None, lr=None)
    suite = write_suite(tmp_path / "suite.yaml", home, **changes)
    said = pool(2).run(fail_on_one_rank, suite, tmp_path / "out")
    assert all("seed 1 failed on 1 of 2 ranks (OSError: disk of rank 1)" in words for words in said)
    record = json.loads((tmp_path / "out/runs/untrained/seed-1/record.json").read_text())
    assert (record["status"], record["error"]) == ("failed", "OSError: disk of rank 1")
    assert not (tmp_path / "out/runs/untrained/seed-2").exists()


def test_answers_are_measured(home: Path, tmp_path: Path) -> None:
    """A task whose golds are the students' own greedy answers, but for one problem: accuracy 3/4 for that student."""
    from tests.data.tokenizers_for_tests import SPECIAL

    words = [f"w{i}" for i in range(3, 7)]
    prompts = [{"id": w, "prompt": w} for w in words]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    cli.run(
        ["rollout", f"--student={home / 'student-1'}", f"--output={tmp_path / 'answers.jsonl'}", "--temperature=0"]
        + [f"--prompt-data={tmp_path / 'p.jsonl'}", "--max-response-length=5"]
    )
    golds = [row["response"] for row in read_jsonl(tmp_path / "answers.jsonl")]
    golds[0] = f"{SPECIAL[3]} none"
    problems = [{"problem": w, "answer": gold} for w, gold in zip(words, golds, strict=True)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    (tmp_path / "echo.yaml").write_text(
        f"kind: exact\ndata: {tmp_path / 'problems.jsonl'}\nprompt_style: raw\nextract: whole\nmax_response_length: 5\n"
    )
    held_out = {"tasks": [str(tmp_path / "echo.yaml")]}
    methods = {"untrained": {"train": False}}
    changes: dict[str, Any] = dict(methods=methods, budgets=None, lr=None, held_out=held_out, seeds=list(SEEDS))
    suite = write_suite(tmp_path / "suite.yaml", home, **changes)
    assert run_suite(suite, tmp_path / "out") == 0
    table = table_of(tmp_path / "out")
    values = table["rows"][0]["measures"]["accuracy"]["values"]
    assert values["1"] == 0.75 and max(values["2"], values["3"]) < 0.75
    assert table["rows"][0]["measures"]["accuracy/echo"]["values"] == values
    assert "| untrained |  |  | 3 |" in (tmp_path / "out/table.md").read_text()
