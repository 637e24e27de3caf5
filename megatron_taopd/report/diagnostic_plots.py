"""Plots of the fixed-context diagnostic; docs/diagnostics.md has the schema of what they read."""

from __future__ import annotations

from typing import Any

from megatron_taopd.report.forest import ends_of, finite, forest
from megatron_taopd.report.plots import SERIES_COLOURS, Axis, Intervals, Line, Plot, Rule
from megatron_taopd.report.scales import number

MAIN_SCORES = ("teachability", "incompatible", "divergence", "entropy")


def gain_plots(report: dict[str, Any]) -> list[Plot]:
    checkpoints = report["checkpoints"]
    plots = [
        forest(
            key="diagnostic-gain",
            title="Mean gain",
            unit="G, nats a position",
            names=[checkpoint["name"] for checkpoint in checkpoints],
            groups={"": [(checkpoint["gain"]["mean"], checkpoint["gain"]["interval"]) for checkpoint in checkpoints]},
        )
    ]
    if report.get("comparisons"):
        comparisons = report["comparisons"]
        plots.append(
            forest(
                key="diagnostic-comparisons",
                title=f"Difference from {comparisons[0]['reference']}",
                unit="mean difference of G, nats, paired by position",
                names=[comparison["checkpoint"] for comparison in comparisons],
                groups={"": [(c["mean_difference"], c["interval"]) for c in comparisons]},
            )
        )
    return plots


def label(report: dict[str, Any], name: str) -> str:
    return str(report.get("labels", {}).get(name, name))


def quartile_plot(report: dict[str, Any], checkpoint: dict[str, Any], region: str, key: str) -> Plot | None:
    records = [r for r in checkpoint["quartiles"] if r["region"] == region and r["score"] in MAIN_SCORES]
    if not records:
        return None
    marks: list[Any] = [Rule(name="", value=0, axis="y")]
    scores = [s for s in MAIN_SCORES if any(r["score"] == s for r in records)]
    for index, score in enumerate(scores):
        own = sorted((r for r in records if r["score"] == score), key=lambda r: r["quartile"])
        shift = (index - (len(scores) - 1) / 2) * 0.17
        pairs = [ends_of(r["interval"]) for r in own]
        marks.append(
            Intervals(
                name=label(report, score),
                place=[r["quartile"] - 1 + shift for r in own],
                centre=[finite(r["mean"]) for r in own],
                low=[low for low, _ in pairs],
                high=[high for _, high in pairs],
                colour=SERIES_COLOURS[index],
                across="x",
            )
        )
    where = "all positions" if region == "all" else "within Q3"
    return Plot(
        key=f"{key}-quartiles-{region}",
        title=f"Quartiles of a score, {where}",
        x=Axis(label="quartile of the score", names=["lowest", "second", "third", "highest"]),
        y=Axis(label="mean G, nats"),
        marks=marks,
        summary=f"Mean gain by quartile, {where}: "
        + "; ".join(f"{r['score']} quartile {r['quartile']} {number(finite(r['mean']))}" for r in records),
    )


def tercile_plot(report: dict[str, Any], checkpoint: dict[str, Any], key: str) -> Plot | None:
    records = checkpoint["terciles"]
    scores = list(dict.fromkeys(r["score"] for r in records))
    if not scores:
        return None
    groups = {}
    for region, name in (("all", "all positions"), ("q3", "within Q3")):
        by_score = {r["score"]: r for r in records if r["region"] == region}
        if by_score:
            pick = [by_score.get(score, {}) for score in scores]
            groups[name] = [(r.get("difference"), r.get("interval")) for r in pick]
    return forest(
        key=f"{key}-terciles",
        title="Highest minus lowest third of a score",
        unit="difference of mean G, nats",
        names=[label(report, score) for score in scores],
        groups=groups,
    )


def regression_plots(report: dict[str, Any], checkpoint: dict[str, Any], key: str) -> list[Plot]:
    plots = []
    for model in ("decomposition", "interaction"):
        records = [r for r in checkpoint["regressions"] if r["model"] == model and r["support_mode"] == "exact"]
        records = [r for r in records if r["compatibility_scale"] in ("quantile", None)]
        main = [r for r in records if r["support_k"] == report["settings"]["support_k"]] or records[:1]
        if not main:
            continue
        terms = [term["term"] for term in main[0]["terms"]]
        groups = {}
        for record in records:
            by_term = {term["term"]: term for term in record["terms"]}
            pick = [by_term.get(term, {}) for term in terms]
            groups[f"K = {record['support_k']}"] = [(t.get("coefficient"), t.get("interval")) for t in pick]
        plots.append(
            forest(
                key=f"{key}-{model}",
                title=f"Regression of the gain: {model}",
                unit="standardised coefficient",
                names=[label(report, term) for term in terms],
                groups=groups,
                note=f"R² = {number(finite(main[0]['r_squared']))} at K = {main[0]['support_k']}.",
            )
        )
    return plots


def budget_plot(report: dict[str, Any], checkpoint: dict[str, Any], key: str) -> Plot | None:
    settings = report["settings"]
    records = [
        r
        for r in checkpoint["budgets"]
        if r["support_k"] in (settings["support_k"], None)
        and r["support_mode"] in ("exact", None)
        and r["compatibility_scale"] in ("quantile", None)
    ]
    selectors = [s for s in settings["selectors"] if any(r["selector"] == s for r in records)]
    if not selectors:
        return None
    marks: list[Any] = [Rule(name="all positions", value=finite(checkpoint["gain"]["mean"]), axis="y")]
    for index, selector in enumerate(selectors):
        own = sorted((r for r in records if r["selector"] == selector), key=lambda r: r["keep_ratio"])
        marks.append(
            Line(
                name=selector,
                x=[r["keep_ratio"] for r in own],
                y=[finite(r["mean"]) for r in own],
                colour=SERIES_COLOURS[index % len(SERIES_COLOURS)],
                dashed=index >= len(SERIES_COLOURS),
                markers=True,
            )
        )
    return Plot(
        key=f"{key}-budgets",
        title="Gain where a selector would have kept",
        x=Axis(label="budget", scale="log", format="percent"),
        y=Axis(label="mean G at kept positions, nats"),
        marks=marks,
        summary="Mean gain by selector and budget; the numbers are in the table.",
    )
