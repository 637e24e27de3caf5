"""The page of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_taopd import __version__
from megatron_taopd.report.blocks import Block, Fact, Facts, Notices, Page, Plots, Prose, Section, Table, Texts
from megatron_taopd.report.checks import Notice, notices
from megatron_taopd.report.curves import curve_groups, metric_table
from megatron_taopd.report.run_directory import RunDirectory
from megatron_taopd.report.scales import duration, number, share
from megatron_taopd.report.score_tables import SameContexts, ScoreTable, quadrants, same_contexts, table_facts
from megatron_taopd.report.selection_plots import table_plots
from megatron_taopd.report.settings import setting_groups
from megatron_taopd.report.sparkline import sparkline
from megatron_taopd.report.texts import TextGroup


def run_page(
    run: RunDirectory,
    *,
    tables: Sequence[ScoreTable] = (),
    dumped: ScoreTable | None = None,
    texts: Sequence[TextGroup] = (),
    diagnostics: Section | None = None,
    title: str | None = None,
    made_with: str,
) -> Page:
    """Put the page of a run together.

    Args:
        tables: score tables, in the order in which they were made.
        dumped: what the run itself wrote down of a step; shown where there are no score tables.
    """
    found = notices(run)
    sections = [
        _overview(run, same_contexts(tables), found),
        _curves(run),
        *(_selection(tables) if tables or dumped is None else _dumped_selection(dumped)),
        *_texts(texts),
        *([diagnostics] if diagnostics is not None else []),
        _configuration(run),
        _versions(run),
    ]
    return Page(
        kind="Report of a distillation run",
        title=title or _title(run),
        subtitle=_subtitle(run),
        sections=sections,
        made_with=made_with,
    )


def _title(run: RunDirectory) -> str:
    teachers = run.config.get("teacher")
    names = teachers if isinstance(teachers, list) else [teachers]
    return f"{_model(run.config.get('student'))} ← {', '.join(_model(t) for t in names)}"


def _model(path: Any) -> str:
    """Last part of a model's path, or the name that a teacher was given."""
    name, equals, _ = str(path).partition("=")
    return name if equals else Path(str(path)).name or "?"


def _subtitle(run: RunDirectory) -> str:
    config = run.config
    parts = [f"selector {config.get('selector', '?')}"]
    asked = run.metrics[-1].get("keep_ratio_asked")
    if asked is not None:
        parts.append(f"budget {share(asked)}")
    parts += [f"loss {config.get('loss', '?')}", f"{number(run.metrics[-1]['iteration'])} iterations"]
    if run.starts:
        parts.append(f"started {str(run.starts[0].get('time', ''))[:16].replace('T', ' ')} UTC")
    return " · ".join(parts)


def _overview(run: RunDirectory, held_out: SameContexts | None, found: Sequence[Notice]) -> Section:
    first, last = run.metrics[0], run.metrics[-1]
    kept = math.fsum(v for v in run.series("num_kept_tokens") if math.isfinite(v))
    valid = math.fsum(v for v in run.series("num_valid_tokens") if math.isfinite(v))
    spent = math.fsum(v for v in run.series("time_step") if math.isfinite(v))
    speeds = [v for v in run.series("tokens_per_second") if math.isfinite(v)]
    facts = []
    if held_out is not None:
        facts.append(
            Fact(
                label=f"KL(teacher ‖ student), the same contexts, {held_out.before} → {held_out.after}",
                value=f"{number(held_out.kl_before)} → {number(held_out.kl_after)}",
                note=f"{_signed(held_out.change)}, mean over {number(held_out.positions)} positions, nats",
            )
        )
    facts += [
        Fact(
            label="KL(teacher ‖ student), each step's own responses",
            value=f"{number(first.get('kl_forward'))} → {number(last.get('kl_forward'))}",
            note="first and last iteration, nats a token; contexts change from step to step",
        ),
        Fact(
            label="Tokens that carried the loss",
            value=number(kept / valid if valid else None, "percent"),
            note=f"{number(kept)} of {number(valid)}",
        ),
        Fact(
            label="Time in steps",
            value=duration(spent),
            note=f"{number(float(np.median(speeds)) if speeds else None)} tokens a second, median",
        ),
    ]
    blocks: list[Block] = [Facts(facts=facts, large=True)]
    blocks.append(
        Notices(notices=found)
        if found
        else Prose(text="The run logged no warning, and its numbers give no reason for one.")
    )
    return Section(key="overview", title="Overview", blocks=blocks)


def _signed(change: float) -> str:
    return ("+" if change > 0 else "") + number(change, "percent")


def _curves(run: RunDirectory) -> Section:
    rows = [
        [row.name, sparkline(run.series(row.name)), row.first, row.last, row.mean, row.lowest, row.highest]
        for row in metric_table(run)
    ]
    blocks: list[Block] = [Plots(title=title, plots=plots) for title, plots in curve_groups(run)]
    blocks.append(
        Table(
            caption="Every recorded metric",
            header=["metric", "", "first", "last", "mean", "lowest", "highest"],
            rows=rows,
            folded=True,
            note="docs/metrics.md says what each one is.",
        )
    )
    return Section(key="curves", title="Training", blocks=blocks)


def _selection(tables: Sequence[ScoreTable]) -> list[Section]:
    if not tables:
        return []
    blocks = [block for table in tables for block in _table_blocks(table, f"Score table {table.name}")]
    return [Section(key="selection", title="What was selected", lead=_SELECTION, blocks=blocks)]


def _dumped_selection(table: ScoreTable) -> list[Section]:
    if not len(table):
        return []
    said = (
        f"No score table was given. This is {number(len(set(table.ids)))} responses of one step that the run trained "
        "on and wrote down (--dump-kept-interval); more of them, the same before and after, are shown with "
        "`taopd score --output` and --score-table."
    )
    blocks = [Prose(text=said), *_table_blocks(table, table.name.replace("-", " ").capitalize())]
    return [Section(key="selection", title="What was selected", lead=_SELECTION, blocks=blocks)]


_SELECTION = (
    "Every response position has a disagreement D between the two models and a compatibility C, the probability that "
    "the teacher gives to the tokens which the student considers. The selector keeps the positions with the highest "
    "score."
)


def _table_blocks(table: ScoreTable, title: str) -> list[Block]:
    return [
        Plots(title=title, plots=table_plots(table)),
        Facts(facts=[Fact(label=label, value=value) for label, value in table_facts(table)]),
        Table(
            caption="Quarters of the plane of entropy and disagreement, split at their medians",
            header=["quarter", "of all positions", "of those kept", "kept of it", "mean KL, nats"],
            rows=[[q.name, q.share, q.of_kept, q.keep_ratio, q.mean_kl] for q in quadrants(table)],
        ),
    ]


def _texts(groups: Sequence[TextGroup]) -> list[Section]:
    if not any(group.texts for group in groups):
        return []
    lead = (
        "Kept tokens, which carry the loss, are bold and underlined. The shade is the measure chosen below, from low "
        "to high; point at a token, or step through with the arrow keys, for its numbers."
    )
    return [Section(key="text", title="Kept tokens in their text", lead=lead, blocks=[Texts(groups=groups)])]


def _configuration(run: RunDirectory) -> Section:
    groups = setting_groups(run.config)
    changed = [setting for group in groups for setting in group.settings if setting.changed]
    blocks: list[Block] = [
        Table(
            caption="Set otherwise than by default",
            header=["flag", "value"],
            rows=[[setting.flag, setting.value] for setting in changed],
            words=True,
        ),
        *(
            Table(
                caption=f"All settings: {group.title}",
                header=["flag", "value"],
                rows=[[setting.flag, setting.value] for setting in group.settings],
                marked=[setting.changed for setting in group.settings],
                words=True,
                folded=True,
            )
            for group in groups
        ),
    ]
    return Section(key="configuration", title="Configuration", blocks=blocks)


def _versions(run: RunDirectory) -> Section:
    if not run.starts:
        text = "The run's directory has no starts.jsonl, so that the versions it ran with are not known."
        return Section(key="versions", title="Versions", blocks=[Prose(text=text)])
    names = list(dict.fromkeys(name for start in run.starts for name in start.get("versions", {})))
    header = ["start", *(str(start.get("time", "?"))[:19].replace("T", " ") for start in run.starts)]
    rows = [
        ["host", *(str(start.get("host", "–")) for start in run.starts)],
        ["ranks", *(str(start.get("world_size", "–")) for start in run.starts)],
        ["GPUs", *(", ".join(map(str, start.get("gpus", []))) or "none" for start in run.starts)],
        *([name, *(str(start.get("versions", {}).get(name, "–")) for start in run.starts)] for name in names),
    ]
    caption = f"This page was made by megatron_taopd {__version__}"
    return Section(
        key="versions", title="Versions", blocks=[Table(caption=caption, header=header, rows=rows, words=True)]
    )
