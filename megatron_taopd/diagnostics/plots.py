"""PNG plots of a report, from the numbers of ``report.json`` and, for the cloud of points, the bank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_taopd.diagnostics.bank import Bank
from megatron_taopd.diagnostics.gain import Gain
from megatron_taopd.diagnostics.libraries import library
from megatron_taopd.diagnostics.markdown import variant

Record = dict[str, Any]
_MOST_POINTS = 20_000
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:gray")


def draw_all(report: Record, bank: Bank, gains: Sequence[Gain], directory: Path) -> dict[str, str]:
    """Write the plots that this report has the numbers for.

    Returns:
        Name to file name.
    """
    k = report["settings"]["support_k"]
    plots: dict[str, Callable[[], Any]] = {
        "k_sensitivity": lambda: _k_sensitivity(report),
        "bound": lambda: _bound(bank, k),
    }
    if gains:
        plots = {
            "gain": lambda: _gain(gains),
            "quartiles": lambda: _quartiles(report),
            "regressions": lambda: _regressions(report),
            "budgets": lambda: _budgets(report),
            **plots,
        }
    files = {}
    for name, draw in plots.items():
        files[name] = f"{name}.png"
        figure = draw()
        figure.savefig(directory / files[name], dpi=110)
    return files


def _subplots(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, np.ndarray]:
    """A figure that needs no display and no global state, and its axes [rows, columns]."""
    figure = library("matplotlib.figure").Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _value(number: float | None) -> float:
    return np.nan if number is None else number


def _bars(value: float | None, interval: Sequence[float | None]) -> list[list[float]]:
    """Lengths below and above a point, as matplotlib's error bars want them."""
    middle, low, high = (_value(x) for x in (value, *interval))
    return [[max(middle - low, 0.0)], [max(high - middle, 0.0)]]


def _gain(gains: Sequence[Gain]) -> Any:
    """Distribution of G, and its mean along the response."""
    figure, axes = _subplots(1, 2, width=5.2, height=3.8)
    spread, along = axes[0]
    edge = max(float(np.quantile(np.abs(gain.columns["gain"]), 0.99)) for gain in gains) or 1.0
    for index, gain in enumerate(gains):
        values = gain.columns["gain"].astype(np.float64)
        style = {"color": _colour(index), "label": gain.name}
        spread.hist(np.clip(values, -edge, edge), bins=np.linspace(-edge, edge, 61), histtype="step", **style)
        bins = np.linspace(0, gain.columns["position"].max() + 1, 13)
        place = np.digitize(gain.columns["position"], bins) - 1
        counts = np.bincount(place, minlength=12)
        with np.errstate(invalid="ignore"):
            means = np.bincount(place, weights=values, minlength=12) / counts
        along.plot((bins[1:] + bins[:-1]) / 2, means, marker="o", markersize=3, **style)
    spread.set(yscale="log", xlabel="G (nats; the ends hold what is beyond)", ylabel="positions", title="gain")
    along.axhline(0, color="0.7", linewidth=0.8)
    along.set(xlabel="position in the response", ylabel="mean G (nats)", title="along the response")
    along.legend(frameon=False, fontsize=8)
    return figure


def _quartiles(report: Record) -> Any:
    """Mean G by quartile: a panel a score, a row a region."""
    labels, checkpoints = report["labels"], report["checkpoints"]
    scores = list(dict.fromkeys(row["score"] for row in checkpoints[0]["quartiles"]))
    figure, axes = _subplots(2, len(scores), width=2.2, height=2.6)
    for at_row, region in enumerate(("all", "q3")):
        for at_column, score in enumerate(scores):
            panel = axes[at_row, at_column]
            for index, checkpoint in enumerate(checkpoints):
                for row in checkpoint["quartiles"]:
                    if (row["region"], row["score"]) == (region, score):
                        shift = 0.12 * (index - (len(checkpoints) - 1) / 2)
                        panel.errorbar(
                            row["quartile"] + shift,
                            _value(row["mean"]),
                            yerr=_bars(row["mean"], row["interval"]),
                            fmt="o",
                            markersize=4,
                            color=_colour(index),
                            label=checkpoint["name"] if row["quartile"] == 1 else None,
                        )
            panel.axhline(0, color="0.7", linewidth=0.8)
            panel.set(xticks=[1, 2, 3, 4], title=labels[score] if at_row == 0 else "")
            panel.tick_params(labelsize=7)
        axes[at_row, 0].set_ylabel(f"mean G (nats)\n{labels[region]}", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
    figure.supxlabel("quartile of the score", fontsize=9)
    return figure


def _regressions(report: Record) -> Any:
    """Coefficients of both models at every K, exact and by quantiles; a row a checkpoint."""
    labels, checkpoints = report["labels"], report["checkpoints"]
    figure, axes = _subplots(len(checkpoints), 2, width=5.0, height=3.4)
    for at_row, checkpoint in enumerate(checkpoints):
        for at_column, model in enumerate(("decomposition", "interaction")):
            panel = axes[at_row, at_column]
            found = [
                r
                for r in checkpoint["regressions"]
                if (r["model"], r["support_mode"], r["compatibility_scale"]) == (model, "exact", "quantile")
            ]
            names = list(dict.fromkeys(term["term"] for r in found for term in r["terms"]))
            for index, regression in enumerate(found):
                for term in regression["terms"]:
                    panel.errorbar(
                        term["coefficient"],
                        names.index(term["term"]) + 0.16 * (index - (len(found) - 1) / 2),
                        xerr=_bars(term["coefficient"], term["interval"]),
                        fmt="o",
                        markersize=4,
                        color=_colour(index),
                        label=f"K = {regression['support_k']}" if term is regression["terms"][0] else None,
                    )
            panel.axvline(0, color="0.7", linewidth=0.8)
            panel.set(yticks=range(len(names)), yticklabels=[labels[name] for name in names])
            panel.invert_yaxis()
            panel.set(xlabel="standardised coefficient", title=f"{checkpoint['name']}: {model}")
            if names and at_column == 1:
                panel.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _budgets(report: Record) -> Any:
    """Mean G of the kept positions over the budget, for the method's own form of every selector."""
    k, checkpoints = report["settings"]["support_k"], report["checkpoints"]
    figure, axes = _subplots(1, len(checkpoints), width=6.0, height=4.2)
    for panel, checkpoint in zip(axes[0], checkpoints, strict=True):
        curves: dict[str, list[Record]] = {}
        for row in checkpoint["budgets"]:
            if variant(row, k) == row["selector"]:
                curves.setdefault(row["selector"], []).append(row)
        for index, (name, rows) in enumerate(curves.items()):
            panel.errorbar(
                [100 * row["keep_ratio"] * 1.012 ** (index - len(curves) / 2) for row in rows],
                [row["mean"] for row in rows],
                yerr=np.hstack([_bars(row["mean"], row["interval"]) for row in rows]),
                marker="o",
                markersize=4,
                linewidth=1,
                elinewidth=0.6,
                color=_colour(index),
                linestyle="-" if index < len(_COLOURS) else "--",
                label=name,
            )
        panel.axhline(checkpoint["gain"]["mean"], color="0.5", linewidth=0.8, linestyle=":", label="all positions")
        ratios = [100 * ratio for ratio in report["settings"]["keep_ratios"]]
        panel.set_xscale("log")
        panel.set_xticks(ratios, labels=[f"{ratio:g}" for ratio in ratios])
        panel.minorticks_off()
        panel.set(xlabel="budget ρ (%)", ylabel="mean G of the kept (nats)", title=checkpoint["name"])
        panel.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _k_sensitivity(report: Record) -> Any:
    """How alike the rankings of different K are, and what K does to C."""
    figure, axes = _subplots(1, 2, width=4.8, height=3.4)
    alike, mass = axes[0]
    ks = [row["support_k"] for row in report["k_sensitivity"]]
    for name, label in (("spearman_D", "D"), ("spearman_C", "C"), ("spearman_score", "D̃·C̃")):
        alike.plot(ks, [_value(row[name]) for row in report["k_sensitivity"]], marker="o", label=f"Spearman {label}")
    for place, ratio in enumerate(report["settings"]["keep_ratios"]):
        shares = [row["kept_overlap"][place]["overlap"] for row in report["k_sensitivity"]]
        alike.plot(ks, shares, marker="x", linestyle="--", linewidth=0.8, label=f"same kept, ρ = {ratio:g}")
    alike.set(xticks=ks, xlabel="K", title=f"against K = {report['settings']['support_k']}")
    alike.legend(frameon=False, fontsize=7)
    for quantile, label in (("q05", "5 %"), ("q25", "25 %"), ("q50", "median"), ("mean", "mean")):
        mass.plot(ks, [row["C"][quantile] for row in report["supports"]], marker="o", label=label)
    mass.set(xticks=ks, xlabel="K", title="C: teacher's mass on the student's top K")
    mass.legend(frameon=False, fontsize=7)
    return figure


def _bound(bank: Bank, k: int) -> Any:
    """Exact C and D against what two top-K lists give."""
    figure, axes = _subplots(1, 2, width=4.4, height=4.0)
    exact, upstream = (bank.statistics(k, mode) for mode in ("exact", "upstream"))
    step = -(-len(exact) // _MOST_POINTS)
    for panel, name in zip(axes[0], ("C", "D"), strict=True):
        x, y = (getattr(statistics, name).numpy()[::step] for statistics in (exact, upstream))
        top = float(max(x.max(), y.max(), 1e-9))
        panel.scatter(x, y, s=4, alpha=0.3, color="tab:blue", edgecolors="none", rasterized=True)
        panel.plot([0, top], [0, top], color="0.5", linewidth=0.8)
        panel.set(xlabel=f"{name}, exact", ylabel=f"{name} of two top-K lists", title=f"{name}, K = {k}")
    return figure
