"""The diagnostic's section has the numbers of report.json."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_taopd import cli
from megatron_taopd.errors import DataError
from tests.report.diagnosis import EVIL
from tests.report.pages import Element, parse, series, table


def write_run(directory: Path) -> Path:
    directory.mkdir()
    (directory / "metrics.jsonl").write_text('{"iteration": 1, "loss": 1.0}\n')
    (directory / "config.yaml").write_text("student: s\n")
    return directory


@pytest.fixture
def report(diagnosis: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(diagnosis)


@pytest.fixture(scope="module")
def page(diagnosis: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Element:
    root = tmp_path_factory.mktemp("diagnostics")
    (root / "report.json").write_text(json.dumps(diagnosis))
    run = write_run(root / "run")
    cli.run(["report", f"--log-dir={run}", f"--diagnostics={root}"])
    return parse((run / "report.html").read_text())


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def test_gain_and_contrast(page: Element, report: dict[str, Any]) -> None:
    rows = table(page, "Gain of every checkpoint, nats a position")[1:]
    assert [row[0] for row in rows] == [EVIL, "weak"]
    for row, checkpoint in zip(rows, report["checkpoints"], strict=True):
        gain = checkpoint["gain"]
        mean, low, high = map(number, re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", row[5]).groups())
        assert [mean, low, high] == pytest.approx([gain["mean"], *gain["interval"]], rel=1e-3)
        assert number(row[2]) == pytest.approx(gain["kl_forward_before"], rel=1e-3)
        assert number(row[4].removesuffix(" %")) == pytest.approx(100 * gain["gap_closed"], rel=5e-3)
    contrast = table(page, "Learnable against incompatible disagreement: standardised coefficients at K = 16")[1:]
    wanted = [
        r["contrast"]["difference"]
        for checkpoint in report["checkpoints"]
        for r in checkpoint["regressions"]
        if r["contrast"] and r["support_k"] == 16 and r["support_mode"] == "exact"
    ]
    assert [number(row[4].split()[0]) for row in contrast] == pytest.approx(wanted, rel=1e-3)
    assert len(contrast) == 4  # two checkpoints, C scaled by its quantiles and raw


def test_budgets(page: Element, report: dict[str, Any]) -> None:
    found = series(page, "diagnostic-1-budgets")
    assert found["x"] == [0.01, 0.03, 0.05, 0.1]
    for selector in ("teachability", "entropy", "random"):
        wanted = [
            budget["mean"]
            for budget in report["checkpoints"][0]["budgets"]
            if budget["selector"] == selector
            and budget["support_k"] == 16
            and budget["support_mode"] == "exact"
            and budget["compatibility_scale"] in ("quantile", None)
        ]
        assert found[selector] == pytest.approx(wanted, rel=1e-5), selector
    assert len(table(page, f"{EVIL}: gain at matched budgets")) - 1 == len(report["checkpoints"][0]["budgets"])


def test_coefficients_lie_where_they_should(page: Element, report: dict[str, Any]) -> None:
    """The x of the dots is a linear map of the coefficients, the same for all terms and K."""
    figure = page.by_id("plot-diagnostic-1-decomposition")
    dots = [
        list(map(float, re.findall(r"M([\d.]+) ", path.attributes["d"])))
        for path in figure.all("path", "dots")
        if "solid" in path.classes
    ]
    chosen = [
        [term["coefficient"] for term in r["terms"]]
        for r in report["checkpoints"][0]["regressions"]
        if (r["model"], r["support_mode"], r["compatibility_scale"]) == ("decomposition", "exact", "quantile")
    ]
    pixels, values = np.concatenate(dots), np.concatenate(chosen)
    assert pixels.size == values.size == 10
    slope, start = np.polyfit(values, pixels, 1)
    assert slope > 0 and np.abs(start + slope * values - pixels).max() < 0.2


def test_what_is_undefined_is_a_dash(report: dict[str, Any], tmp_path: Path) -> None:
    for checkpoint in report["checkpoints"]:
        for quartile in checkpoint["quartiles"][:3]:
            quartile.update(mean=None, interval=None, median=None)
    run = write_run(tmp_path / "run")
    (tmp_path / "report.json").write_text(json.dumps(report))
    cli.run(["report", f"--log-dir={run}", f"--diagnostics={tmp_path / 'report.json'}"])
    page = parse((run / "report.html").read_text())
    assert table(page, "weak: gain by quartile of every score")[1][-2:] == ["–", "–"]
    (tmp_path / "report.json").write_text(json.dumps({**report, "checkpoints": [], "comparisons": []}))
    cli.run(["report", f"--log-dir={run}", f"--diagnostics={tmp_path / 'report.json'}"])
    page = parse((run / "report.html").read_text())
    assert len(table(page, "The bank at each K")) == 3 and "Gain of every checkpoint" not in page.text


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "taopd-diagnostic-report", "format_version": 9}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(DataError, match="--diagnostics .*(not valid JSON|taopd diagnose report)"):
        cli.run(["report", f"--log-dir={write_run(tmp_path / 'run')}", f"--diagnostics={tmp_path}"])
