"""Flags, refusals, runs that are long, broken off or strange, and what the wheel contains."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_taopd import cli
from megatron_taopd.commands.report import ReportConfig
from megatron_taopd.errors import ConfigError, DataError
from tests.needs import needs_module
from tests.report.pages import Element, parse, series
from tests.report.runs import make_run
from tests.test_cli import unexplained_fields

ROOT = Path(__file__).parents[2]
LINE = {"iteration": 1, "loss": 0.5, "kl_forward": 0.4, "keep_ratio": 0.1, "keep_ratio_asked": 0.1}


def log_dir(path: Path, lines: list[object], config: str = "student: s\nteacher: t\ntrain_iters: 3\n") -> Path:
    path.mkdir(exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text)
    (path / "config.yaml").write_text(config)
    return path


def page_of(run: Path, *words: str) -> Element:
    cli.run(["report", f"--log-dir={run}", *words])
    return parse((run / "report.html").read_text(encoding="utf-8"))


def notices(page: Element) -> str:
    return page.by_id("overview").text


def test_every_flag_is_explained() -> None:
    assert unexplained_fields(ReportConfig) == []


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "neither is given"),
        (["--log-dir=a", "--suite=b"], "both are given"),
        (["--log-dir=a", "--output=x.pdf"], r"--output x.pdf must end in .html"),
        (["--suite=a", "--score-table=b.parquet"], r"--score-table \['b.parquet'\] has no effect with --suite"),
        (["--suite=a", "--diagnostics=b"], "--diagnostics b has no effect with --suite"),
        (["--log-dir=a", "--tokenizer=b"], "--tokenizer b has no effect without --score-table"),
        (["--log-dir=a", "--responses=0"], "--responses 0 must be at least 1"),
    ],
)
def test_refusals(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run(["report", *words])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_directory_that_is_none_is_refused() -> None:
    with pytest.raises(DataError, match="--log-dir nowhere is no directory"):
        cli.run(["report", "--log-dir=nowhere"])


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "has no complete line"),
        ([{"loss": 1}], r"metrics.jsonl:1: 'iteration' is missing"),
        ([LINE, {"iteration": 1}], r"metrics.jsonl:2: iteration 1 comes after 1; two runs"),
        ([LINE, "{torn", LINE], r"metrics.jsonl:2: not valid JSON"),
        ([{**LINE, "loss": "x"}], r"metrics.jsonl:1: 'loss' must be a number, not 'x'"),
    ],
)
def test_bad_metrics_are_refused(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        cli.run(["report", f"--log-dir={log_dir(tmp_path / 'run', lines)}"])


def test_bad_score_tables_are_refused(tmp_path: Path) -> None:
    run = log_dir(tmp_path / "run", [LINE])
    (tmp_path / "a.jsonl").write_text('{"id": "a", "position": 0, "token_id": 5}\n')
    (tmp_path / "b.parquet").write_text("no parquet")
    for name, error, message in (
        ("a.jsonl", DataError, "a.jsonl:1 has no keep, D, C"),
        ("b.parquet", DataError, "is no parquet file"),
        ("c.parquet", DataError, "is missing"),
        ("d.csv", ConfigError, "must end in .parquet or .jsonl"),
    ):
        with pytest.raises(error, match=message):
            cli.run(["report", f"--log-dir={run}", f"--score-table={tmp_path / name}"])


def test_a_run_that_was_broken_off_says_so(tmp_path: Path) -> None:
    lines = [LINE, {**LINE, "iteration": 2, "kl_forward": math.nan, "skipped": 1.0}, '{"iteration": 3, "lo']
    page = page_of(log_dir(tmp_path / "run", lines))
    assert "The run has done 2 of 3 iterations." in notices(page)
    assert "last line of metrics.jsonl is cut off" in notices(page)
    assert "1 of 2 steps were refused by the optimizer" in notices(page)
    assert "Not a finite number in some iterations: kl_forward." in notices(page)
    assert series(page, "kl")["all positions"] == [0.4, None]
    assert "no starts.jsonl" in page.by_id("versions").text


def test_a_run_that_is_in_order_says_nothing(tmp_path: Path) -> None:
    lines = [
        {**LINE, "iteration": i, "kl_forward": 1 / i, "response_length": 40, "low_C_share": 0.2} for i in (1, 2, 3)
    ]
    run = log_dir(tmp_path / "run", lines)
    assert "logged no warning" in notices(page_of(run))


def test_numbers_that_speak_against_a_run(tmp_path: Path) -> None:
    lines = [
        {**LINE, "iteration": i, "kl_forward": 0.3 + 0.01 * i, "response_length": 400 / i, "keep_ratio": 0.25}
        | {"low_C_share": 0.001}
        for i in range(1, 21)
        if i != 7
    ]
    text = notices(page_of(log_dir(tmp_path / "run", lines, "train_iters: 20\n")))
    assert "Iterations that metrics.jsonl lacks between its first and its last: 1." in text
    assert "25.0 % of the positions were kept, the budget is 10.0 %" in text
    assert "KL(teacher ‖ student) did not fall: 0.325 nats" in text  # mean of the first four
    assert "Responses became shorter: 208.3 tokens at first, 21.7" in text
    assert "C is below 0.5 at 0.10 % of the positions" in text


def test_a_long_run_stays_small_and_hides_no_spike(tmp_path: Path) -> None:
    names = [f"kept_overlap/{i}" for i in range(20)]
    lines = [{**LINE, "iteration": i, **dict.fromkeys(names, i / 7)} for i in range(1, 6001)]
    lines[4321]["loss"] = 77.0
    run = log_dir(tmp_path / "run", lines)
    page = page_of(run)
    data = json.loads(page.by_id("plot-loss").all("script")[0].text)
    loss = data["series"][0]
    assert len(data["x"]) <= 240 and max(loss["high"]) == 77.0 and min(loss["low"]) == 0.5
    assert "A point is the mean of 25 iterations." in page.by_id("plot-loss").text
    assert (run / "report.html").stat().st_size < 400_000


def test_ids_are_shown_where_the_student_is_gone(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = log_dir(tmp_path / "run", [LINE], f"student: {tmp_path / 'gone'}\n")
    page = page_of(run, f"--score-table={root / 'before.parquet'}", "--responses=2")
    assert "token ids instead of text" in capsys.readouterr().out
    assert "give --tokenizer for text" in page.by_id("text").text
    tokens = page.by_id("text").all("p", "tokens")
    assert len(tokens) == 2 and tokens[0].all()[0].text == "⟨5⟩"
    page = page_of(run, f"--score-table={root / 'before.parquet'}", f"--tokenizer={root / 'student'}")
    assert "⟨5⟩" not in page.by_id("text").text


def test_limits_of_the_text(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(make_run(root), run)
    page = page_of(run, "--responses=1", "--response-tokens=2")
    for article in page.by_id("text").all("article"):
        kept, of, positions, _ = article.all("header")[0].all("small")[0].text.split()
        assert len([t for t in article.all("p", "tokens")[0].all() if t.tag in ("i", "b")]) == min(2, int(positions))
        assert (f"and {int(positions) - 2} more positions" in article.text) == (int(positions) > 2)
    assert len(page.by_id("text").all("article")) == 3  # one of each dump


def test_pngs_are_those_of_the_page(tmp_path: Path) -> None:
    run = log_dir(tmp_path / "run", [LINE, {**LINE, "iteration": 2}])
    page = page_of(run, f"--png={tmp_path / 'png'}")
    keys = {figure.attributes["id"].removeprefix("plot-") for figure in page.all("figure")}
    assert {p.stem for p in (tmp_path / "png").iterdir()} == keys == {"kl", "loss", "keep_ratio"}


def test_a_wheel_contains_the_templates(tmp_path: Path) -> None:
    needs_module("setuptools")  # torch brings it
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "megatron_taopd", source / "megatron_taopd", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    names = zipfile.ZipFile(source / done.stdout.split()[-1]).namelist()
    templates = {p.name for p in (ROOT / "megatron_taopd/report/templates").iterdir()}
    assert len(templates) == 4
    assert {f"megatron_taopd/report/templates/{name}" for name in templates} <= set(names)
