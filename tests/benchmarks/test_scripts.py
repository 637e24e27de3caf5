"""Every benchmark runs, at toy shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_score
import bench_step
import common
import op_kinds
import pytest
import run
from problem import Shape, make_problem
from targets import targets_table

from megatron_taopd.errors import ConfigError
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.benchmarks.conftest import BENCHMARKS
from tests.data.tokenizers_for_tests import TEMPLATE, save_word_tokenizer

TINY_CHUNK = ["--logits-chunk-bytes", "65536"]


def script(name: str, *words: str, out: Path) -> list[dict[str, Any]]:
    """Tables of one run."""
    told = [sys.executable, str(BENCHMARKS / name), *words, "--threads", "1", "--rounds", "1", "--out", str(out)]
    done = subprocess.run(told, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = json.loads(out.read_text())
    for table in tables:
        assert table["environment"]["threads"] == 1
        assert table["command"].startswith(f"python benchmarks/{name} ")
        assert table["title"] in done.stdout
    assert targets_table([common.Table(**table) for table in tables]).title == "Targets"
    return tables


def test_loss(tmp_path: Path):
    (table,) = script(
        "bench_loss.py", "--shapes", "64,16,24,2000", "--only", "ρ = 0.05", *TINY_CHUNK, out=tmp_path / "loss.json"
    )
    rows = {row["contender"]: row for row in table["rows"]}
    assert rows["dense torch"]["best_ratio"] == 1.0
    # Both models' logits and their log-softmaxes against a few rows at a time.
    assert rows["ours, ρ = 0.05"]["tensors_mib"] < 0.5 * rows["dense torch"]["tensors_mib"]
    assert all(row["best"] > 0 for row in rows.values())


def test_score(tmp_path: Path):
    words = ["--shapes", "64,16,24,2000", "--floor-rows", "16", "64", "--no-compiled", *TINY_CHUNK]
    (table,) = script("bench_score.py", *words, out=tmp_path / "score.json")
    names = [row["contender"] for row in table["rows"]]
    assert names[0] == "token_statistics" and "of that, Python" in names
    floor = next(row for row in table["rows"] if row["contender"] == "two products, 64 rows a chunk")
    assert floor["ratio_best_floor"] >= 1.0


def test_compiled_statistics_are_left_out_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    def without_compiler(*_: Any, compiled: bool) -> None:
        raise ConfigError("no compiler is here")

    monkeypatch.setattr(bench_score, "our_statistics", without_compiler)
    problem = make_problem(Shape.parse("4,4,4,40"))
    assert bench_score.compile_once(problem, 65536, 4) == ({}, f"{bench_score.COMPILED} left out: no compiler is here")


def test_profile(tmp_path: Path):
    (table,) = script("bench_profile.py", "--shapes", "64,16,24,2000", *TINY_CHUNK, out=tmp_path / "profile.json")
    assert [row["call"].split()[0] for row in table["rows"]] == ["token_statistics", "ours,"]
    for row in table["rows"]:
        assert sum(row[kind] for kind in op_kinds.COLUMNS) == pytest.approx(100)
        assert row["matrix products"] > 0 and row["exp, softmax"] > 0


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm_", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::mul_", "subtract, multiply, add"),
        ("aten::view", op_kinds.OTHER),
        ("_ChunkedLoss", op_kinds.PYTHON),
    ],
)
def test_kinds_of_operations(operation: str, kind: str):
    assert op_kinds.kind_of(operation) == kind


def test_tensor_parallel_traffic_is_that_of_the_formula(tmp_path: Path):
    words = ["--shapes", "32,16,24,400", "32,16,24,800", "--ranks", "1", "2", *TINY_CHUNK]
    (table,) = script("bench_tp.py", *words, out=tmp_path / "tp.json")
    rows = {(row["vocab"], row["ranks"], row["phase"]): row for row in table["rows"]}
    for (vocab, ranks, phase), row in rows.items():
        if ranks == 1:
            assert row["counted"] == 0
        else:
            assert row["ratio"] == pytest.approx(1.0, abs=0.1), row
            assert row["counted"] == rows[400, ranks, phase]["counted"], f"grows with the vocabulary {vocab}"
            # Every caller is known as a quantity.
            assert "(" not in row["by_quantity"], row
    scoring = rows[400, 2, "scoring"]
    assert scoring["by_quantity"] == "candidates 384, sums 32, token 8" and scoring["counted"] == 424
    # Rows of both models' hidden states, half of them from the other rank.
    assert rows[400, 2, "scoring, sequence parallel"]["counted"] == 424 + (16 + 24) * 4 / 2


def test_growth(tmp_path: Path):
    words = [
        "--base",
        "64,16,24,2000",
        "--factors",
        "1",
        "4",
        "--axes",
        "T",
        "T at 2 V",
        "--ranks",
        "1",
        "2",
        *TINY_CHUNK,
    ]
    table, ranks = script("bench_growth.py", *words, out=tmp_path / "growth.json")
    assert [(row["phase"].split()[0], row["axis"]) for row in table["rows"]] == [
        *(("scoring", "T"), ("scoring", "T at 2 V"), ("loss", "T"), ("loss", "T at 2 V"))
    ]
    # Chunks of few rows: the peak of scoring has a candidate more or less. That of the loss has none.
    scoring, loss = (row["value"] for row in targets_table([common.Table(**table)]).rows)
    assert scoring == pytest.approx(1, abs=0.3) and loss == pytest.approx(1, abs=1e-6)
    assert [row["phase"] for row in ranks["rows"]] == ["scoring", "loss + gradient"]
    assert all(abs(row["memory_slope"]) < 1.5 for row in ranks["rows"])


@pytest.fixture
def tiny_models(tmp_path: Path) -> Path:
    """What prepare.py makes, tiny."""
    words = [f"w{i}" for i in range(60)]
    for seed, name in enumerate(("student", "teacher")):
        save_tiny_hf_model(tmp_path / name, "llama", vocab_size=65, num_layers=2, seed=seed)
        save_word_tokenizer(tmp_path / name, words, chat_template=TEMPLATE)
    lines = [{"messages": [{"role": "user", "content": f"w{i} w{i + 1} w3"}]} for i in range(8)]
    (tmp_path / "train_prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_step_of_both_sides(tiny_models: Path, tmp_path: Path):
    words = ["--models", str(tiny_models), "--processes", "1", "--batch", "2", "--response-length", "4", "--steps", "1"]
    # A tiny model draws any token now and then; the one that stops it must not be among them.
    (table,) = script(
        "bench_step.py", *words, "--stop-token", "<pad>", "--only", "ours, ρ = 0.1", out=tmp_path / "s.json"
    )
    row = table["rows"][0]
    assert row["tokens_per_second"] > 0 and row["rollout"] > 0 and row["peak_mib"] > 100
    assert [0 < step["tokens"] <= 8 for step in row["steps"]] == [True]


def test_carried_beside_global(tiny_models: Path, tmp_path: Path):
    words = ["--models", str(tiny_models), "--batch", "4", "--response-length", "8", "--steps", "2"]
    (table,) = script("bench_carried.py", *words, out=tmp_path / "c.json")
    runs = {row["run"]: row for row in table["rows"]}
    assert runs["global"]["ratio"] == 1 and runs["global"]["agreement"] is None
    assert 0 <= runs["carried"]["agreement"] <= 1 and runs["carried"]["score"] > 0


def test_stop_token_that_is_not_there_is_refused(tiny_models: Path, tmp_path: Path):
    with pytest.raises(SystemExit, match="no special token <x>"):
        bench_step.without_stops(tiny_models / "student", tmp_path / "copy", "<x>")


def test_results_of_each_benchmark_are_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So that a run that is interrupted has left what it had."""
    made = iter([[common.Table("score/1", "Scoring: x", {}, [{"ratio_same_chunk": 1.0, "ratio_best_floor": 1.1}])]])

    def answer(name: str, *_: Any) -> list[common.Table]:
        try:
            return next(made)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(run, "run_job", answer)
    monkeypatch.setattr(sys, "argv", ["run.py", "--full", "--only", "score", "tp", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        run.main()
    found = json.loads((tmp_path / "results.json").read_text())
    assert [table["name"] for table in found] == ["targets", "score/1", "duration"] and len(found[0]["rows"]) == 2
    assert "### Duration" in (tmp_path / "results.md").read_text()


def test_run_collects_tables_and_names_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    score = "--shapes 64,16,24,2000 --rounds 1 --floor-rows 64 --no-memory --no-compiled"
    monkeypatch.setattr(
        run,
        "JOBS",
        {
            "score": run.Job("bench_score.py", score, score),
            "tp": run.Job("bench_tp.py", "--shapes nonsense", ""),
        },
    )
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--short", "--threads", "1", "--only", "score", "tp", "--out", str(tmp_path)]
    )
    with pytest.raises(SystemExit, match="failed: tp"):
        run.main()
    tables = json.loads((tmp_path / "results.json").read_text())
    assert [table["name"] for table in tables] == ["targets", "score/64x2000", "duration"]
    assert [row["benchmark"] for row in tables[2]["rows"]] == ["score", "in all"]
    assert tables[2]["rows"][-1]["seconds"] > 0
    assert tables[1]["command"] == f"python benchmarks/bench_score.py {score} --threads 1"
    text = (tmp_path / "results.md").read_text()
    assert "### Targets" in text and "### Scoring: T 64" in text
    assert common.Table(**tables[1]).rows == tables[1]["rows"]
