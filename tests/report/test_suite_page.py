"""The page of a suite has the numbers of its table, and says what is missing."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t

from megatron_taopd import cli
from megatron_taopd.errors import DataError
from megatron_taopd.suite.plan import HELD_OUT
from tests.report.pages import Element, parse, series, table
from tests.report.suites import make_suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("suite")
    make_suite(directory)
    cli.run(["report", f"--suite={directory}", f"--output={directory / 'page.html'}"])
    return directory


@pytest.fixture(scope="module")
def page(suite: Path) -> Element:
    return parse((suite / "page.html").read_text(encoding="utf-8"))


def records(suite: Path, method: str, budget: float | None) -> dict[int, dict[str, Any]]:
    """Finished records of the chosen learning rate, 3e-4, and the suite's own seeds."""
    found = [json.loads(path.read_text()) for path in (suite / "runs" / method).rglob("record.json")]
    mine = [r for r in found if r["budget"] == budget and r["lr"] in (3e-4, None) and r["seed"] < 10]
    return {r["seed"]: r for r in mine if r["status"] == "finished"}


def interval(values: list[float]) -> tuple[float, float]:
    n = len(values)
    return statistics.fmean(values), float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5


def cell(text: str) -> tuple[float, float]:
    mean, half = re.fullmatch(r"\+?(\S+)(?: %)? ± (\S+?)(?: %| pp)?", text).groups()
    return float(mean.replace("−", "-").replace(",", "")), float(half.replace(",", ""))


def test_table_is_that_of_the_records(page: Element, suite: Path) -> None:
    header, *rows = table(page, "All rows, on the held-out set")
    assert "accuracy, chain_sum" not in header  # the only task is the accuracy
    kl, accuracy = header.index("forward KL, nats/token"), header.index("accuracy")
    assert header[kl + 1] == header[accuracy + 1] == "minus full"
    full = records(suite, "full", None)
    for method, budget, seeds in (("teachability", 0.05, 5), ("tip", 0.05, 4), ("random", 0.1, 5)):
        row = next(r for r in rows if r[:2] == [method, f"{100 * budget:g} %"])
        own = records(suite, method, budget)
        assert row[2] == "3e−4" and row[3] == str(seeds) == str(len(own))
        values = {seed: record["measured"][HELD_OUT] for seed, record in own.items()}
        mean, half = interval([v["kl_forward"] for v in values.values()])
        assert cell(row[kl]) == (pytest.approx(mean, rel=1e-3), pytest.approx(half, rel=1e-3))
        versus = [v["kl_forward"] - full[seed]["measured"][HELD_OUT]["kl_forward"] for seed, v in values.items()]
        mean, half = interval(versus)
        assert cell(row[kl + 1]) == (pytest.approx(mean, rel=1e-3), pytest.approx(half, rel=1e-3))
        mean, half = interval([100 * v["accuracy"] for v in values.values()])
        assert cell(row[accuracy]) == (pytest.approx(mean, rel=1e-2), pytest.approx(half, rel=1e-2))


def test_curves_are_means_over_seeds(page: Element, suite: Path) -> None:
    found = series(page, "suite-curve-kl_forward-0_05")
    assert found["x"] == list(range(1, 41))
    runs = (suite / "runs/entropy/budget-0.05/lr-0.0003").glob("seed-?/metrics.jsonl")
    lines = [[json.loads(line)["kl_forward"] for line in run.read_text().splitlines()] for run in runs]
    assert len(lines) == 5
    assert found["entropy"] == pytest.approx([statistics.fmean(v) for v in zip(*lines, strict=True)], rel=1e-5)


def test_budgets_and_learning_rates(page: Element, suite: Path) -> None:
    found = series(page, "suite-kl_forward-budgets")
    assert found["x"] == [0.05, 0.1] and "full" not in found
    for budget, value in zip(found["x"], found["divergence"], strict=True):
        values = [r["measured"][HELD_OUT]["kl_forward"] for r in records(suite, "divergence", budget).values()]
        assert value == pytest.approx(statistics.fmean(values), rel=1e-5)
    swept = series(page, "suite-sweep-0_1")
    assert swept["x"] == [1e-4, 3e-4, 1e-3] and min(swept["tip"]) == swept["tip"][1]
    rows = [row for row in table(page, "Every learning rate tried") if row[0] == "tip at 10 %"]
    assert [row[1] for row in rows if row[-1] == "chosen"] == ["3e−4"]


def test_forests_have_a_row_a_method_and_the_seeds(page: Element) -> None:
    figure = page.by_id("plot-suite-kl_forward-0_05")
    methods = ["full", "teachability", "teachability_raw", "entropy", "tip", "divergence", "random", "incompatible"]
    assert [e.text for e in figure.all("text") if e.attributes["text-anchor"] == "end"][: len(methods)] == methods
    dots = "".join(e.attributes["d"] for e in figure.all("path", "rest"))
    assert dots.count("h0") == 8 * 5 - 2  # one failed and one is missing
    assert "Without training: untrained 0.9" in figure.all("p", "note")[0].text


def test_what_is_missing_is_said(page: Element) -> None:
    notices = [item.text for item in page.all("ul", "notices")[0].all("li")]
    assert any("tip at 5 %: the runs of seed 3 are not made yet" in n for n in notices)
    assert any("random at 5 %: the runs of seed 5 failed" in n for n in notices)
    assert len(notices) == 2


def test_suite_file_is_text(page: Element) -> None:
    assert "<script>alert(1)</script>" in page.all("pre")[0].text
    scripts = [s for s in page.all("script") if s.attributes.get("type") != "application/json"]
    assert len(scripts) == 1
    assert "<b>host</b>" in page.by_id("configuration").text


def test_a_directory_without_a_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"table\.json.*taopd suite table"):
        cli.run(["report", f"--suite={tmp_path}"])
    (tmp_path / "table.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="in format 1"):
        cli.run(["report", f"--suite={tmp_path}"])
