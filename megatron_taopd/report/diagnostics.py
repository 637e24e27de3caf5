"""The fixed-context diagnostic (``report.json`` of ``taopd diagnose report``) as plots and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_taopd.errors import DataError
from megatron_taopd.report.blocks import Block, Fact, Facts, Plots, Section, Table
from megatron_taopd.report.diagnostic_plots import (
    budget_plot,
    gain_plots,
    quartile_plot,
    regression_plots,
    tercile_plot,
)
from megatron_taopd.report.diagnostic_tables import (
    budget_table,
    interval,
    quartile_table,
    regression_table,
    support_blocks,
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
    blocks += support_blocks(report)
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
        regression_table(report, checkpoint),
        budget_table(report, checkpoint),
        quartile_table(report, checkpoint),
    ]
