"""Tables of the fixed-context diagnostic; docs/diagnostics.md has the schema of what they read."""

from __future__ import annotations

from typing import Any

from megatron_taopd.report.blocks import Block, Prose, Table
from megatron_taopd.report.diagnostic_plots import label
from megatron_taopd.report.scales import number, share


def interval(record: dict[str, Any] | None, value: str) -> str:
    """``0.12 [0.10, 0.14]``."""
    if record is None or record.get(value) is None:
        return "–"
    low, high = record.get("interval") or (None, None)
    return number(record[value]) + (f" [{number(low)}, {number(high)}]" if low is not None else "")


def regression_table(report: dict[str, Any], checkpoint: dict[str, Any]) -> Table:
    rows = []
    for r in checkpoint["regressions"]:
        for term in r["terms"]:
            rows.append(
                [
                    label(report, term["term"]),
                    r["model"],
                    number(r["support_k"]),
                    _variant(r),
                    interval(term, "coefficient"),
                    number(term["standard_error"]),
                    number(term["p_value"]),
                ]
            )
        if r.get("contrast"):
            contrast = r["contrast"]
            rows.append(
                [
                    "learnable − incompatible",
                    r["model"],
                    number(r["support_k"]),
                    _variant(r),
                    interval(contrast, "difference"),
                    number(contrast["standard_error"]),
                    number(contrast["p_value"]),
                ]
            )
    return Table(
        caption=f"{checkpoint['name']}: all regressions of z(G)",
        header=["term", "model", "K", "variant", "coefficient", "standard error", "p"],
        rows=rows,
        folded=True,
    )


def _variant(record: dict[str, Any]) -> str:
    parts = (record.get("support_mode"), record.get("compatibility_scale"))
    return ", ".join(str(part) for part in parts if part) or "–"


def budget_table(report: dict[str, Any], checkpoint: dict[str, Any]) -> Table:
    rows = [
        [
            r["selector"],
            share(r["keep_ratio"]),
            number(r["support_k"]),
            _variant(r),
            number(r["kept"]),
            interval(r, "mean"),
            number(r["median"]),
            number(r["gain_share"], "percent"),
            number(r["kl_forward_before"]),
            number(r["gap_closed"], "percent"),
        ]
        for r in checkpoint["budgets"]
    ]
    header = [
        *("selector", "budget", "K", "variant", "kept", "mean G", "median G"),
        *("share of all G", "KL before", "gap closed"),
    ]
    return Table(caption=f"{checkpoint['name']}: gain at matched budgets", header=header, rows=rows, folded=True)


def quartile_table(report: dict[str, Any], checkpoint: dict[str, Any]) -> Table:
    rows = [
        [
            label(report, r["score"]),
            {"all": "all", "q3": "Q3"}.get(r["region"], r["region"]),
            number(r["quartile"]),
            f"{number(r['score_low'])} to {number(r['score_high'])}",
            number(r["positions"]),
            interval(r, "mean"),
            number(r["median"]),
        ]
        for r in checkpoint["quartiles"]
    ]
    return Table(
        caption=f"{checkpoint['name']}: gain by quartile of every score",
        header=["score", "positions of", "quartile", "score from", "positions", "mean G", "median G"],
        rows=rows,
        folded=True,
    )


def support_blocks(report: dict[str, Any]) -> list[Block]:
    supports = [
        [
            number(s["support_k"]),
            number(s["C"]["mean"]),
            number(s["C"]["q05"]),
            number(s["low_C_share"], "percent"),
            number(s["D"]["mean"]),
            number(s["low_D_share"], "percent"),
            number(s["overlap"], "percent"),
            number(s["teacher_top5_share"], "percent"),
        ]
        for s in report["supports"]
    ]
    bound = [
        [
            number(b["support_k"]),
            number(b["C_gap"]["mean"]),
            number(b["C_gap"]["q95"]),
            number(b["C_gap_above_1e-1"], "percent"),
            number(b["spearman_C"]),
            number(b["spearman_score"]),
            *_overlaps(b),
        ]
        for b in report["bound"]
    ]
    ratios = [share(r) for r in report["settings"]["keep_ratios"]]
    sensitivity = [
        [
            number(k["support_k"]),
            number(k["spearman_D"]),
            number(k["spearman_C"]),
            number(k["spearman_score"]),
            *_overlaps(k),
        ]
        for k in report["k_sensitivity"]
    ]
    return [
        Prose(text="What the bank is like, and what depends on K and on C being exact:"),
        Table(
            caption="The bank at each K",
            header=["K", "mean C", "C, 5 %", "C < 0.5", "mean D", "D < 0.1", "overlap", "top 5 share"],
            rows=supports,
        ),
        Table(
            caption="Exact C against the lower bound of top-K lists",
            header=[
                "K",
                "mean gap",
                "gap, 95 %",
                "gap > 0.1",
                "ρ of C",
                "ρ of score",
                *(f"same kept at {r}" for r in ratios),
            ],
            rows=bound,
        ),
        Table(
            caption=f"Teachability at each K against K = {report['settings']['support_k']}",
            header=["K", "ρ of D", "ρ of C", "ρ of score", *(f"same kept at {r}" for r in ratios)],
            rows=sensitivity,
        ),
    ]


def _overlaps(record: dict[str, Any]) -> list[str]:
    return [number(o["overlap"], "percent") for o in record["kept_overlap"]]
