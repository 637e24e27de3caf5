"""The page of a run: its numbers are those of the run's files, and nothing that a model wrote is markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from megatron_taopd import cli
from megatron_taopd.errors import DataError
from tests.report.pages import Element, parse, series, table
from tests.report.runs import HOSTILE, make_run


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    run = make_run(root)
    line = json.dumps({"level": "warning", "where": "x", "message": HOSTILE[0] + " was seen"}) + "\n"
    (run / "warnings.jsonl").write_text(2 * line)
    cli.run(
        [
            *("report", f"--log-dir={run}", f"--score-table={root / 'before.parquet'}"),
            *(f"--score-table={root / 'after.jsonl'}", f"--rollout-data={root / 'rollouts.jsonl'}"),
            *(f"--title={HOSTILE[2]}", f"--output={root / 'page.html'}", "--responses=9"),
        ]
    )
    return (root / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Element:
    return parse(text)


@pytest.fixture(scope="module")
def metrics(root: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (make_run(root) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def before(root: Path) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in pq.read_table(root / "before.parquet").to_pydict().items()}


@pytest.mark.parametrize(
    "plot, names",
    {
        "kl": {"all positions": "kl_forward", "kept positions": "kept_kl_forward"},
        "loss": {"loss": "loss"},
        "keep_ratio": {"kept": "keep_ratio", "budget": "keep_ratio_asked"},
        "compatibility": {"mean": "mean_C", "median": "C_q50"},
        "quadrant_keep_ratio": {"Q3: sure, far": "quadrant_keep_ratio/Q3"},
        "kept_overlap": {"entropy": "kept_overlap/entropy"},
        "times": {"all": "time_step", "scoring": "time_score"},
    }.items(),
)
def test_curves_are_the_metrics(page: Element, metrics: list[dict], plot: str, names: dict[str, str]) -> None:
    found = series(page, plot)
    assert found["x"] == [1, 2, 3]
    for name, metric in names.items():
        wanted = [line.get(metric) for line in metrics]
        assert [v if v is None else pytest.approx(v, rel=1e-5) for v in found[name]] == wanted, metric


def test_every_metric_is_in_the_table(page: Element, metrics: list[dict]) -> None:
    rows = {row[0]: row for row in table(page, "Every recorded metric")[1:]}
    assert set(rows) == {name for line in metrics for name in line} - {"iteration"}
    assert rows["num_kept_tokens"][-5] == f"{metrics[0]['num_kept_tokens']:.0f}"
    assert float(rows["mean_H"][-1]) == pytest.approx(max(line["mean_H"] for line in metrics), rel=1e-3)


def test_headline_is_the_kl_of_the_same_contexts(page: Element, before: dict[str, np.ndarray]) -> None:
    first = page.by_id("overview").all("dl")[0].all("div")[0]
    assert "before → after" in first.all("dt")[0].text
    numbers = [float(v) for v in re.findall(r"\d+\.\d+", first.all("dd")[0].text)]
    mean = before["kl_forward"].mean()
    assert numbers[:3] == [pytest.approx(mean, rel=1e-3), pytest.approx(mean / 2, rel=1e-3), 50.0]
    assert "−50.0 %" in first.text and f"{len(before['D'])} positions" in first.text


def test_figures_of_a_score_table(page: Element, before: dict[str, np.ndarray]) -> None:
    facts = [{dt.text: dd.text for dt, dd in zip(e.all("dt"), e.all("dd"), strict=True)} for e in page.all("dl")]
    own = next(f for f in facts if "positions with C < 0.5" in f)
    keep, kl = before["keep"], before["kl_forward"]
    assert own["positions"] == str(len(keep))
    assert own["kept"].startswith(f"{keep.sum()} (")
    assert float(own["mean KL(teacher ‖ student)"].split()[0]) == pytest.approx(kl.mean(), rel=1e-3)
    assert float(own["share of all KL that lies there"].split()[0]) == pytest.approx(
        100 * kl[keep].sum() / kl.sum(), rel=1e-2
    )
    rows = {
        row[0]: row for row in table(page, "Quarters of the plane of entropy and disagreement, split at their medians")
    }
    inside = (before["H_norm"] < np.median(before["H_norm"])) & (before["D_norm"] >= np.median(before["D_norm"]))
    assert float(rows["Q3: sure, far"][3].split()[0]) == pytest.approx(100 * keep[inside].mean(), rel=1e-2)


def test_dots_of_the_plane_are_the_positions(page: Element, before: dict[str, np.ndarray]) -> None:
    figure = page.by_id("plot-before-plane")
    count = {
        name: sum(path.attributes["d"].count("h0") for path in figure.all("path", name)) for name in ("kept", "rest")
    }
    assert count == {"kept": before["keep"].sum(), "rest": (~before["keep"]).sum()}
    # The dot furthest right of the kept ones is where D̃ is largest: the scale is linear and ends at 1.
    x = [float(v) for v in re.findall(r"M([\d.]+) ", " ".join(p.attributes["d"] for p in figure.all("path", "kept")))]
    axis = next(p for p in figure.all("path", "axis")).attributes["d"]
    left, right = map(float, re.fullmatch(r"M([\d.]+) [\d.]+H([\d.]+)", axis).groups())
    shares = sorted((v - left) / (right - left) for v in x)
    assert shares == pytest.approx(sorted(before["D_norm"][before["keep"]]), abs=1e-3)


def test_without_a_score_table_the_last_dump_is_plotted(root: Path) -> None:
    run = make_run(root)
    cli.run(["report", f"--log-dir={run}", f"--output={root / 'dumped.html'}"])
    page = parse((root / "dumped.html").read_text(encoding="utf-8"))
    dumps = sorted((run / "kept_tokens").glob("*.jsonl"))
    lines = [json.loads(line) for line in dumps[-1].read_text().splitlines()]
    columns = {name: np.concatenate([line[name] for line in lines]) for name in ("keep", "kl_forward")}
    keep = columns["keep"]
    said = page.by_id("selection").text
    assert "No score table was given." in said and f"{len(lines)} responses of one step" in said
    dots = page.by_id("plot-iteration-3-plane")
    for name, count in (("kept", keep.sum()), ("rest", (~keep).sum())):
        assert sum(path.attributes["d"].count("h0") for path in dots.all("path", name)) == count
    (facts,) = page.by_id("selection").all("dl")
    found = {dt.text: dd.text for dt, dd in zip(facts.all("dt"), facts.all("dd"), strict=True)}
    assert found["positions"] == str(len(keep)) and found["responses"] == str(len(lines))
    assert float(found["mean KL(teacher ‖ student)"].split()[0]) == pytest.approx(
        columns["kl_forward"].mean(), rel=1e-3
    )
    drawn = page.by_id("plot-iteration-3-score").all("svg")[0].attributes["aria-label"]
    assert f"histogram of {len(keep)} positions" in drawn


def test_a_malformed_dump_is_refused(root: Path, tmp_path: Path) -> None:
    run = make_run(root)
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    line = json.loads(next((run / "kept_tokens").glob("*.jsonl")).read_text().splitlines()[0])
    (tmp_path / "kept_tokens").mkdir()
    (tmp_path / "kept_tokens/iter_0000001.jsonl").write_text(json.dumps({**line, "C": line["C"][1:]}) + "\n")
    with pytest.raises(DataError, match="C must"):
        cli.run(["report", f"--log-dir={tmp_path}"])


def test_kept_tokens_are_shown_in_their_text(page: Element, root: Path) -> None:
    dumps = sorted((make_run(root) / "kept_tokens").glob("*.jsonl"))
    lines = [json.loads(line) for line in dumps[-1].read_text().splitlines()]
    group = next(g for g in page.all("details", "group") if g.all("summary")[0].text.startswith("Iteration 3"))
    responses = group.all("article")
    assert len(responses) == len(lines) > 1
    for response, line in zip(responses, lines, strict=True):
        tokens = response.all("p", "tokens")[0].all()
        tokens = [t for t in tokens if t.tag in ("i", "b")]
        assert [t.tag == "b" for t in tokens] == line["keep"]
        assert response.all("header")[0].text.endswith(f"{sum(line['keep'])} of {len(line['keep'])} kept")
        for token, piece, d, norm in zip(tokens, line["pieces"], line["D"], line["D_norm"], strict=True):
            if not re.search(r"[\x00-\x1f\u202e]", piece):
                assert token.text == (piece or "·")
            shown = re.match(r"D (\S+) ", token.attributes["title"])[1].replace("−", "-")
            assert float(shown) == pytest.approx(d, rel=1e-3)
            assert f"d{min(9, int(10 * norm))}" in token.classes


def test_line_breaks_are_kept_and_controls_are_spelled_out(page: Element) -> None:
    texts = [t for p in page.all("p", "tokens") for t in p.all()]
    assert any("⟨right-to-left override⟩right-to-left" in t.text for t in texts)
    index = next(i for i, t in enumerate(texts) if "two↵" in t.text)
    assert texts[index].text.endswith("lines↵") and texts[index + 1].tag == "br"
    assert "\u202e" not in page.text and "\x00" not in page.text


def test_nothing_from_outside_and_no_markup_of_a_model(page: Element, text: str) -> None:
    tags = {e.tag for e in page.all()}
    assert tags.isdisjoint({"img", "link", "iframe", "object", "embed", "base", "form", "image", "use", "video"})
    for element in page.all():
        for name, value in element.attributes.items():
            assert not name.startswith("on") and name not in ("src", "style", "action", "xlink:href", "srcset"), name
            if name == "href":
                assert re.fullmatch(r"#[a-z]+", value), value
    style = page.all("style")
    assert len(style) == 1 and not re.search(r"url\(|@import|https?:", style[0].text)
    scripts = [s for s in page.all("script") if s.attributes.get("type") != "application/json"]
    assert len(scripts) == 1 and not re.search(r"https?:|fetch|XMLHttp|eval|innerHTML", scripts[0].text)
    assert len(page.all("h1")) == 1 and page.all("h1")[0].text == HOSTILE[2]
    assert page.all("h1")[0].all() == []
    policy = next(m for m in page.all("meta") if m.attributes.get("http-equiv")).attributes["content"]
    for kind, element in (("style", style[0]), ("script", scripts[0])):
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    visible = page.all("main")[0].text
    for word in HOSTILE[:3]:
        assert word in visible
    assert "{{7*7}}" in visible and "49" not in re.findall(r"w\d+|\d+", page.by_id("text").all("p", "tokens")[0].text)


def test_warnings_and_configuration(page: Element, root: Path) -> None:
    notices = [item.text for item in page.all("ul", "notices")[0].all("li")]
    assert any(HOSTILE[0] + " was seen (2 times)" in n and "the run" in n for n in notices)
    config = yaml.safe_load((make_run(root) / "config.yaml").read_text())
    shown = {row[0]: row[1] for row in table(page, "Set otherwise than by default")[1:]}
    assert shown["--keep-ratio"] == "0.2" and shown["--support-k"] == "8"
    assert shown["--log-dir"] == config["log_dir"]
    assert "--selector" not in shown
    flags = [
        row[0]
        for region in page.by_id("configuration").all("div", "scroll")[1:]
        for row in [[c.text for c in r.all("th")] for r in region.all("tr")[1:]]
    ]
    assert sorted(flags) == sorted("--" + name.replace("_", "-") for name in config)
    start = json.loads((make_run(root) / "starts.jsonl").read_text().splitlines()[0])
    versions = dict(row[:2] for row in page_rows(page, "versions"))
    assert versions["torch"] == start["versions"]["torch"] and versions["host"] == start["host"]


def page_rows(page: Element, section: str) -> list[list[str]]:
    return [[c.text for c in row.children if isinstance(c, Element)] for row in page.by_id(section).all("tr")]


def test_prompts_are_shown(page: Element) -> None:
    prompts = [p.text for p in page.all("p", "prompt")]
    assert any(HOSTILE[1] in p for p in prompts) and all(prompts)
