"""The fixed-context diagnostic (``report.json`` of ``taopd diagnose report``) as plots and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_taopd.errors import DataError
from megatron_taopd.report.blocks import Block, Fact, Facts, Plots, Prose, Section, Table
from megatron_taopd.report.diagnostic_plots import (
    budget_plot,
    gain_plots,
    label,
    quartile_plot,
    regression_plots,
    tercile_plot,
)
from megatron_taopd.report.scales import number, share

FORMAT, FORMAT_VERSION = "taopd-diagnostic-report", 1


def read_diagnostics(path: str | Path) -> dict[str, Any]:
    """Read ``report.json``, or the one in a directory.

    Raises:
        DataError: it is missing, or is not what ``taopd diagnose report`` writes.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read --diagnostics {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"--diagnostics {path} is not valid JSON: {error}") from error
    found = (report.get("format"), report.get("format_version")) if isinstance(report, dict) else None
    if found != (FORMAT, FORMAT_VERSION):
        raise DataError(
            f"--diagnostics {path} has format and version {found}, not {(FORMAT, FORMAT_VERSION)}; give the "
            "report.json of `taopd diagnose report`"
        )
    return report


def diagnostics_section(report: dict[str, Any]) -> Section:
    """The section of a page."""
    confidence = report["settings"]["confidence"]
    blocks: list[Block] = [Facts(facts=_bank_facts(report["bank"]))]
    if report["checkpoints"]:  # a report may be about the bank alone
        blocks += [_checkpoint_table(report), *_contrast_table(report), Plots(plots=gain_plots(report))]
    for index, checkpoint in enumerate(report["checkpoints"]):
        blocks += _checkpoint_blocks(report, checkpoint, f"diagnostic-{index + 1}")
    blocks += _support_blocks(report)
    return Section(
        key="diagnostic",
        title="Fixed-context diagnostic",
        lead=(
            "Frozen contexts that the initial student wrote are read again by the trained one. The gain G is "
            "KL(teacher ‖ student) before minus after at the same position: positive where the gap closed. Whiskers "
            f"and brackets are {share(confidence)} intervals from resampling whole prompts."
        ),
        blocks=blocks,
    )


def interval(record: dict[str, Any] | None, value: str) -> str:
    """``0.12 [0.10, 0.14]``."""
    if record is None or record.get(value) is None:
        return "–"
    low, high = record.get("interval") or (None, None)
    return number(record[value]) + (f" [{number(low)}, {number(high)}]" if low is not None else "")


def _checkpoint_table(report: dict[str, Any]) -> Table:
    rows = []
    for checkpoint in report["checkpoints"]:
        gain = checkpoint["gain"]
        rows.append(
            [
                checkpoint["name"],
                number(gain["positions"]),
                number(gain["kl_forward_before"]),
                number(gain["kl_forward_after"]),
                number(gain["gap_closed"], "percent"),
                interval(gain, "mean"),
                number(gain["median"]),
                number(gain["trimmed_5_95"]),
                number(gain["positive_share"], "percent"),
            ]
        )
    header = [
        *("checkpoint", "positions", "KL before", "KL after", "gap closed", "mean G"),
        *("median G", "trimmed mean", "G > 0"),
    ]
    return Table(caption="Gain of every checkpoint, nats a position", header=header, rows=rows)


def _bank_facts(bank: dict[str, Any]) -> list[Fact]:
    teachers = ", ".join(teacher["name"] or Path(teacher["path"]).name for teacher in bank["teachers"])
    return [
        Fact(label="bank", value=bank["id"]),
        Fact(label="contexts of", value=Path(bank["student"]["path"]).name),
        Fact(label="teacher", value=teachers),
        Fact(label="prompts", value=number(bank["num_prompts"])),
        Fact(label="positions", value=number(bank["num_positions"])),
    ]


def _contrast_table(report: dict[str, Any]) -> list[Table]:
    """The paper's question: what a standard deviation of learnable and of incompatible disagreement is worth."""
    rows = []
    for checkpoint in report["checkpoints"]:
        for r in checkpoint["regressions"]:
            contrast = r.get("contrast")
            if not contrast or r["support_mode"] != "exact" or r["support_k"] != report["settings"]["support_k"]:
                continue
            terms = {term["term"]: term for term in r["terms"]}
            rows.append(
                [
                    checkpoint["name"],
                    str(r["compatibility_scale"]),
                    interval(terms["learnable"], "coefficient"),
                    interval(terms["incompatible"], "coefficient"),
                    interval(contrast, "difference"),
                    number(contrast["p_value"]),
                ]
            )
    header = ["checkpoint", "C scaled by", "learnable D̃·C̃", "incompatible D̃·(1−C̃)", "difference", "p"]
    k = report["settings"]["support_k"]
    caption = f"Learnable against incompatible disagreement: standardised coefficients at K = {k}"
    return [Table(caption=caption, header=header, rows=rows)] if rows else []


def _checkpoint_blocks(report: dict[str, Any], checkpoint: dict[str, Any], key: str) -> list[Block]:
    plots = [
        *(quartile_plot(report, checkpoint, region, key) for region in ("all", "q3")),
        tercile_plot(report, checkpoint, key),
        *regression_plots(report, checkpoint, key),
        budget_plot(report, checkpoint, key),
    ]
    return [
        Plots(title=checkpoint["name"], plots=[plot for plot in plots if plot is not None]),
        _regression_table(report, checkpoint),
        _budget_table(report, checkpoint),
        _quartile_table(report, checkpoint),
    ]


def _regression_table(report: dict[str, Any], checkpoint: dict[str, Any]) -> Table:
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


def _budget_table(report: dict[str, Any], checkpoint: dict[str, Any]) -> Table:
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


def _quartile_table(report: dict[str, Any], checkpoint: dict[str, Any]) -> Table:
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


def _support_blocks(report: dict[str, Any]) -> list[Block]:
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
