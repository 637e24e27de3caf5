"""``report.md``: the tables of a report, checkpoints side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_taopd.diagnostics.libraries import library

Record = dict[str, Any]


def to_markdown(report: Record) -> str:
    """Tables of a report whose undefined numbers are None."""
    k = report["settings"]["support_k"]
    parts = [_bank(report["bank"])]
    if report["checkpoints"]:
        parts += [
            _gains(report["checkpoints"], report["comparisons"]),
            _quartiles(report),
            _terciles(report),
            _regressions(report["checkpoints"], report["labels"], k),
            _coefficients_by_k(report["checkpoints"]),
            _budgets(report),
        ]
    parts += [_supports(report["supports"]), _sensitivity(report["k_sensitivity"], k), _bound(report["bound"])]
    pictures = [f"![{name}]({file})" for name, file in report["plots"].items()]
    return "\n\n".join([*parts, "## Plots", *pictures]) + "\n"


def number(value: float | None, digits: int = 4) -> str:
    """Decimals, or a dash where it is not defined."""
    return "–" if value is None else f"{value:.{digits}f}"


def with_interval(value: float | None, interval: Sequence[float | None], digits: int = 4) -> str:
    """``0.123 [0.100, 0.150]``."""
    return f"{number(value, digits)} [{number(interval[0], digits)}, {number(interval[1], digits)}]"


def variant(record: Record, k: int) -> str:
    """What distinguishes a ranking from the method's own of the same selector at this K."""
    notes = [f"K={record['support_k']}"] if record["support_k"] != k else []
    notes += ["raw C"] if record["compatibility_scale"] == "raw" else []
    notes += ["upstream"] if record["support_mode"] == "upstream" else []
    return record["selector"] + (f" ({', '.join(notes)})" if notes else "")


def _table(rows: Sequence[Record]) -> str:
    library("tabulate")  # what pandas writes Markdown with
    frame = library("pandas").DataFrame(list(rows))
    return frame.to_markdown(index=False, disable_numparse=True)


def _bank(bank: Record) -> str:
    teachers = ", ".join(teacher["path"] for teacher in bank["teachers"])
    return "\n".join(
        [
            "# Fixed-context diagnostic",
            "",
            f"Bank `{bank['id']}`: {bank['num_positions']} positions of {bank['num_responses']} responses to "
            f"{bank['num_prompts']} prompts, student `{bank['student']['path']}`, teacher `{teachers}`, temperature "
            f"{bank['temperature']:g}.",
            "",
            "G is the decrease of KL(teacher ‖ student) at a position, in nats. Intervals are 95 %, from resampling "
            "whole prompts.",
        ]
    )


def _gains(checkpoints: Sequence[Record], comparisons: Sequence[Record]) -> str:
    shown: list[tuple[str, Callable[[Record], str]]] = [
        ("mean G", lambda g: with_interval(g["mean"], g["interval"])),
        ("median", lambda g: number(g["median"])),
        ("trimmed 5–95 %", lambda g: number(g["trimmed_5_95"])),
        ("winsorised 1/99", lambda g: number(g["winsorized_1_99"])),
        ("winsorised 5/95", lambda g: number(g["winsorized_5_95"])),
        ("share G > 0", lambda g: number(g["positive_share"], 3)),
        ("5 % … 95 %", lambda g: f"{number(g['q05'])} … {number(g['q95'])}"),
        ("KL_f before → after", lambda g: f"{number(g['kl_forward_before'])} → {number(g['kl_forward_after'])}"),
        ("gap closed", lambda g: number(g["gap_closed"], 3)),
        ("KL_r before → after", lambda g: f"{number(g['kl_reverse_before'])} → {number(g['kl_reverse_after'])}"),
    ]
    rows = [{"": title} | {c["name"]: show(c["gain"]) for c in checkpoints} for title, show in shown]
    lines = ["## Gain", "", _table(rows)]
    for c in comparisons:
        difference = with_interval(c["mean_difference"], c["interval"])
        lines += ["", f"Mean G of {c['checkpoint']} less that of {c['reference']}: {difference}."]
    return "\n".join(lines)


def _quartiles(report: Record) -> str:
    labels = report["labels"]
    lines = ["## Mean gain by quartile of each score"]
    for checkpoint in report["checkpoints"]:
        for region in ("all", "q3"):
            cells: dict[str, Record] = {}
            for row in checkpoint["quartiles"]:
                if row["region"] == region:
                    cell = cells.setdefault(row["score"], {"score": labels[row["score"]]})
                    cell[f"quartile {row['quartile']}"] = f"{number(row['mean'])} (n={row['positions']})"
            lines += ["", f"{checkpoint['name']}, {labels[region]}:", "", _table(list(cells.values()))]
    return "\n".join(lines)


def _terciles(report: Record) -> str:
    labels = report["labels"]
    lines = ["## Highest less lowest third of each score"]
    for region in ("all", "q3"):
        cells: dict[str, Record] = {}
        for checkpoint in report["checkpoints"]:
            for row in checkpoint["terciles"]:
                if row["region"] == region:
                    cell = cells.setdefault(row["score"], {"score": labels[row["score"]]})
                    cell[checkpoint["name"]] = with_interval(row["difference"], row["interval"])
        lines += ["", f"{labels[region]}:", "", _table(list(cells.values()))]
    return "\n".join(lines)


def _regressions(checkpoints: Sequence[Record], labels: Record, k: int) -> str:
    lines = [
        "## Standardised regressions of z(G)",
        "",
        f"K = {k}, G winsorised at 1 %, standard errors clustered by prompt.",
    ]
    for model in ("decomposition", "interaction"):
        cells: dict[str, Record] = {}
        for checkpoint in checkpoints:
            found = _regression(checkpoint, model, k)
            for term in found["terms"]:
                cell = cells.setdefault(term["term"], {"term": labels[term["term"]]})
                cell[checkpoint["name"]] = with_interval(term["coefficient"], term["interval"], 3)
            for name in found["left_out"]:
                cells.setdefault(name, {"term": labels[name]})[checkpoint["name"]] = "does not vary"
            last = cells.setdefault("R²", {"term": "R²"})
            last[checkpoint["name"]] = number(found["r_squared"], 3)
        last = cells.pop("R²")
        lines += ["", f"{model}:", "", _table([*cells.values(), last])]
    return "\n".join(lines)


def _regression(checkpoint: Record, model: str, k: int, mode: str = "exact", scale: str = "quantile") -> Record:
    wanted = (model, k, mode, scale)
    keys = ("model", "support_k", "support_mode", "compatibility_scale")
    return next(r for r in checkpoint["regressions"] if tuple(r[key] for key in keys) == wanted)


def _coefficients_by_k(checkpoints: Sequence[Record]) -> str:
    rows = []
    for checkpoint in checkpoints:
        for found in checkpoint["regressions"]:
            if found["model"] != "decomposition":
                continue
            terms = {term["term"]: term for term in found["terms"]}
            contrast = found["contrast"]
            rows.append(
                {
                    "checkpoint": checkpoint["name"],
                    "K": found["support_k"],
                    "support": found["support_mode"],
                    "C": found["compatibility_scale"],
                    **{
                        title: with_interval(terms[name]["coefficient"], terms[name]["interval"], 3)
                        if name in terms
                        else "–"
                        for name, title in (("learnable", "D̃C̃"), ("incompatible", "D̃(1−C̃)"))
                    },
                    "difference": "–"
                    if contrast is None
                    else with_interval(contrast["difference"], contrast["interval"], 3),
                    "ratio": number(contrast and contrast["ratio"], 2),
                }
            )
    text = "The paper reports 0.086–0.087 for D̃C̃ and 0.043–0.045 for D̃(1−C̃) at K = 8, 16, 32."
    return "\n".join(
        ["## Learnable against incompatible disagreement, by K and definition", "", text, "", _table(rows)]
    )


def _budgets(report: Record) -> str:
    k = report["settings"]["support_k"]
    lines = [
        "## Mean gain at the positions that a selector keeps",
        "",
        "Its interval; then the gap closed there.",
    ]
    for checkpoint in report["checkpoints"]:
        cells: dict[str, Record] = {}
        for row in checkpoint["budgets"]:
            name = variant(row, k)
            cell = cells.setdefault(name, {"selector": name})
            text = f"{with_interval(row['mean'], row['interval'])}; {number(row['gap_closed'], 3)}"
            cell[f"ρ = {row['keep_ratio']:g}"] = text
        lines += ["", f"{checkpoint['name']}:", "", _table(list(cells.values()))]
    return "\n".join(lines)


def _supports(supports: Sequence[Record]) -> str:
    rows = [
        {
            "K": s["support_k"],
            "C mean": number(s["C"]["mean"]),
            "C 5 %": number(s["C"]["q05"]),
            "C median": number(s["C"]["q50"]),
            "C < 0.5": number(s["low_C_share"], 3),
            "D mean": number(s["D"]["mean"]),
            "D < 0.1": number(s["low_D_share"], 3),
            "overlap": number(s["overlap"], 3),
            "student's mass on S": number(s["student_mass"]),
        }
        for s in supports
    ]
    return "\n".join(["## Compatibility and disagreement of θ0", "", _table(rows)])


def _kept(record: Record) -> Record:
    return {f"same kept, ρ = {k['keep_ratio']:g}": number(k["overlap"], 3) for k in record["kept_overlap"]}


def _sensitivity(rows: Sequence[Record], k: int) -> str:
    names = {"spearman_D": "D", "spearman_C": "C", "spearman_score": "D̃C̃"}
    shown = [
        {"K": r["support_k"]} | {title: number(r[name], 3) for name, title in names.items()} | _kept(r) for r in rows
    ]
    title = f"## K against K = {k}"
    return "\n".join(
        [title, "", "Spearman's rank correlations, and share of the positions kept by both.", "", _table(shown)]
    )


def _bound(rows: Sequence[Record]) -> str:
    shown = [
        {
            "K": r["support_k"],
            "C − bound, mean": number(r["C_gap"]["mean"], 5),
            "95 %": number(r["C_gap"]["q95"], 5),
            "largest": number(r["C_gap"]["max"]),
            "above 0.01": number(r["C_gap_above_1e-2"], 3),
            "above 0.1": number(r["C_gap_above_1e-1"], 3),
            "Spearman C": number(r["spearman_C"], 3),
            "Spearman D": number(r["spearman_D"], 3),
            "Spearman D̃C̃": number(r["spearman_score"], 3),
        }
        | _kept(r)
        for r in rows
    ]
    return "\n".join(["## Exact C and D against what two top-K lists give", "", _table(shown)])
