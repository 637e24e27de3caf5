"""The page in a real browser: it is drawn, light, dark and on a phone; its script works, and no other script runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from megatron_taopd import cli
from tests.report.pages import chromium, parse
from tests.report.runs import HOSTILE, make_run
from tests.report.suites import make_suite

# Appended to a copy of the page without its policy, which would forbid it: does what a reader does.
READER = """
<script>
const told = {}, tip = document.getElementById("tip");
const press = (element, key) => element.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const figure = document.getElementById("plot-kl");
press(figure, "ArrowRight");
press(figure, "ArrowRight");
told.keys = tip.innerText;
const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 2, clientY: box.top + 9, bubbles: true}));
told.pointer = tip.innerText;
told.cross = getComputedStyle(svg.querySelector(".cross")).visibility;
svg.dispatchEvent(new PointerEvent("pointerleave", {bubbles: true}));
told.left = tip.hidden;
const text = document.querySelector("details[open] .tokens");
press(text, "ArrowRight");
told.token = tip.innerText;
told.said = document.getElementById("said").textContent;
const shade = () => [...document.querySelectorAll("details[open] .c9")].map((e) => getComputedStyle(e).backgroundColor);
told.byScore = shade();
document.getElementById("by-c").checked = true;
told.byC = shade();
told.paper = {};
for (const theme of ["light", "dark"]) {
  document.getElementById(`theme-${theme}`).checked = true;
  told.paper[theme] = getComputedStyle(document.body).backgroundColor;
}
told.diagnostics = {};
for (const key of ["decomposition", "quartiles-all"]) {
  const drawn = document.getElementById(`plot-diagnostic-1-${key}`).querySelector("svg");
  const box = drawn.getBoundingClientRect(), dots = [...drawn.querySelectorAll("path.dots.solid")];
  told.diagnostics[key] = {
    width: box.width,
    height: box.height,
    colours: dots.map((path) => getComputedStyle(path).stroke),
    spans: dots.map((path) => path.getBoundingClientRect()).map((of) => [of.left - box.left, box.right - of.right]),
    whiskers: drawn.querySelectorAll("path.whisker").length,
  };
}
told.overflow = document.documentElement.scrollWidth - innerWidth;
const result = document.createElement("pre");
result.id = "result";
result.textContent = JSON.stringify(told);
document.body.append(result);
</script>
"""


@pytest.fixture(scope="module")
def page(root: Path, diagnosis: dict[str, Any]) -> Path:
    (root / "diagnosis").mkdir()
    (root / "diagnosis/report.json").write_text(json.dumps(diagnosis))
    tables = [f"--score-table={root / 'before.parquet'}", f"--rollout-data={root / 'rollouts.jsonl'}"]
    tables.append(f"--diagnostics={root / 'diagnosis'}")
    cli.run(
        ["report", f"--log-dir={make_run(root)}", *tables, f"--title={HOSTILE[0]}", f"--output={root / 'drawn.html'}"]
    )
    return root / "drawn.html"


def look(picture: Path) -> np.ndarray:
    """[height, width, 3] in [0, 1]."""
    return matplotlib.image.imread(picture)[:, :, :3]


def test_script_and_styles_work(root: Path, page: Path, tmp_path: Path) -> None:
    bare, removed = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    assert removed == 1
    (tmp_path / "page.html").write_text(bare.replace("</body>", READER + "</body>"))
    dom = chromium("--dump-dom", "--window-size=390,900", page=tmp_path / "page.html", scratch=tmp_path / "profile")
    result = re.search(r'<pre id="result">(.*?)</pre>', dom, re.S)
    assert result is not None
    told = json.loads(parse(f"<pre>{result[1]}</pre>").text)
    metrics = [json.loads(line) for line in (make_run(root) / "metrics.jsonl").read_text().splitlines()]
    for what, line in (("keys", metrics[1]), ("pointer", metrics[2])):
        assert told[what].startswith(f"iteration {line['iteration']}")
        assert f"{line['kl_forward']:.4g}" in told[what] and f"{line['kept_kl_forward']:.4g}" in told[what]
    assert told["cross"] == "visible" and told["left"] is True
    assert re.search(r"“.+” (not )?kept\s+D \S+ · C \S+ · H \S+ · KL \S+ · score \S+", told["token"])
    assert told["said"] == told["token"]
    assert len(set(told["byC"])) == 1 and told["byC"] != told["byScore"]
    assert told["paper"] == {"light": "rgb(253, 253, 252)", "dark": "rgb(20, 23, 28)"}
    for key, groups in (("decomposition", 2), ("quartiles-all", 4)):  # two K; four scores
        drawn = told["diagnostics"][key]
        assert drawn["width"] > 250 and drawn["height"] > 120 and drawn["whiskers"] == groups
        assert len(set(drawn["colours"])) == groups and "none" not in drawn["colours"]
        assert all(left > 0 and right > 0 and left + right < drawn["width"] - 20 for left, right in drawn["spans"])
    assert told["overflow"] <= 0  # nothing is wider than the window
    assert "data-hacked" not in re.sub(r">[^<]*<", "><", dom)


def test_a_script_that_slipped_through_does_not_run(page: Path, tmp_path: Path) -> None:
    """The policy of the page is a second wall: markup put in by hand, as if escaping had failed, stays dead."""
    slipped = HOSTILE[0] + '<img src="x" onerror="document.body.dataset.hacked=1"><p id="slipped">here</p>'
    guarded = page.read_text().replace("</main>", f"{slipped}</main>")
    for name, text in (("guarded", guarded), ("bare", guarded.replace("Content-Security-Policy", "X-None"))):
        (tmp_path / f"{name}.html").write_text(text)
        dom = chromium("--dump-dom", page=tmp_path / f"{name}.html", scratch=tmp_path / name)
        body = re.search(r"<body[^>]*>", dom)
        assert body is not None and 'id="slipped"' in dom
        assert ("data-hacked" in body[0]) == (name == "bare")


@pytest.mark.parametrize("width, dark", [(1300, False), (390, True)])
def test_the_page_is_drawn(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    size = f"--window-size={width},2400"
    shot = tmp_path / "shot.png"
    chromium(f"--screenshot={shot}", size, *flags, page=page, scratch=tmp_path / "profile")
    picture = look(shot)
    paper = np.array([20, 23, 28] if dark else [253, 253, 252]) / 255
    assert picture.shape[:2] == (2400, width)
    ink = (np.abs(picture - paper) > 0.1).any(axis=2)
    assert 0.01 < ink.mean() < 0.3
    assert ink[:1200].any() and ink[1200:].any()
    blue = np.array([108, 176, 242] if dark else [35, 104, 176]) / 255  # the first series' colour
    assert (np.abs(picture - blue) < 0.02).all(axis=2).sum() > 200


def test_the_page_of_a_suite_is_drawn(tmp_path: Path) -> None:
    make_suite(tmp_path / "suite")
    cli.run(["report", f"--suite={tmp_path / 'suite'}"])
    shot = tmp_path / "shot.png"
    page = tmp_path / "suite" / "report.html"
    chromium(f"--screenshot={shot}", "--window-size=1300,2400", page=page, scratch=tmp_path / "profile")
    ink = (np.abs(look(shot) - np.array([253, 253, 252]) / 255) > 0.1).any(axis=2)
    assert 0.01 < ink.mean() < 0.3
