"""``taopd report``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from megatron_taopd.cli import parse
from megatron_taopd.errors import ConfigError, TaopdError

if TYPE_CHECKING:
    from megatron_taopd.report.blocks import Page
    from megatron_taopd.report.run_directory import RunDirectory


@dataclass(kw_only=True)
class ReportConfig:
    """One self-contained HTML page about a run, or about a suite of runs."""

    log_dir: str | None = None
    """--log-dir of a `taopd train`: its metrics, configuration, versions, warnings and kept tokens are read."""
    suite: str | None = None
    """Directory of a `taopd suite`; instead of --log-dir."""
    output: str | None = None
    """HTML file to write (default: report.html in the directory that is read)."""
    title: str | None = None
    """Title of the page (default: the names of the models)."""
    score_table: Annotated[list[str], tyro.conf.UseAppendAction]
    """Score table of `taopd score` (.parquet or .jsonl), as FILE or NAME=FILE; the flag again for each. First and last
    are compared where they are of the same responses. Without one, what is selected is shown on the responses that the
    run wrote down last (--dump-kept-interval)."""
    rollout_data: str | None = None
    """Rollouts that the score tables were made from: shows the prompts above the responses."""
    tokenizer: str | None = None
    """Model directory whose tokenizer turns the ids of score tables into text (default: the student of the run)."""
    diagnostics: str | None = None
    """report.json of `taopd diagnose report`, or its directory."""
    responses: int = 8
    """Responses of each source that are shown token by token."""
    response_tokens: int = 400
    """Tokens shown of each."""
    png: str | None = None
    """Directory in which the page's plots are written as PNG, too."""

    def __post_init__(self) -> None:
        if (self.log_dir is None) == (self.suite is None):
            given = "neither is given" if self.log_dir is None else "both are given"
            raise ConfigError(f"a report is about --log-dir (one run) or --suite (many): {given}")
        if self.output is not None and not self.output.endswith(".html"):
            raise ConfigError(f"--output {self.output} must end in .html")
        for flag, value in (("--responses", self.responses), ("--response-tokens", self.response_tokens)):
            if value < 1:
                raise ConfigError(f"{flag} {value} must be at least 1")
        self._check_flags_have_effect()

    def _check_flags_have_effect(self) -> None:
        if self.suite is not None:
            for flag, value in (("--score-table", self.score_table), ("--diagnostics", self.diagnostics)):
                if value:
                    raise ConfigError(
                        f"{flag} {value} has no effect with --suite; make a report of one run with --log-dir"
                    )
        if not self.score_table:
            for flag, name in (("--rollout-data", self.rollout_data), ("--tokenizer", self.tokenizer)):
                if name is not None:
                    raise ConfigError(f"{flag} {name} has no effect without --score-table, whose responses it is for")


def report(words: Sequence[str]) -> None:
    """Write the page."""
    config: ReportConfig = parse(ReportConfig, words, name="report")
    from megatron_taopd.report.html import write_page

    made_with = f"Made by: taopd report {shlex.join(words)}"
    page = _run_page(config, made_with) if config.suite is None else _suite_page(config, made_with)
    directory = Path(str(config.log_dir or config.suite))
    path = write_page(page, config.output or directory / "report.html")
    print(f"> {path} ({path.stat().st_size / 1000:.0f} kB, {len(page.plots())} plots)")
    if config.png is not None:
        from megatron_taopd.report.png import write_pngs

        written = write_pngs(page.plots(), config.png)
        print(f"> {len(written)} PNG files in {config.png}")


def _run_page(config: ReportConfig, made_with: str) -> Page:
    from megatron_taopd.data.records import read_rollouts
    from megatron_taopd.report.diagnostics import diagnostics_section, read_diagnostics
    from megatron_taopd.report.dumped_table import dumped_table
    from megatron_taopd.report.run_directory import read_run
    from megatron_taopd.report.run_page import run_page
    from megatron_taopd.report.score_tables import read_score_table
    from megatron_taopd.report.texts import texts_of_dumps, texts_of_table

    run = read_run(str(config.log_dir))
    limits = {"most_responses": config.responses, "most_tokens": config.response_tokens}
    texts = texts_of_dumps(run.path, **limits)
    tables = [read_score_table(flag) for flag in config.score_table]
    if tables:
        tokenizer = _tokenizer(config, run)
        rollouts = read_rollouts(config.rollout_data) if config.rollout_data is not None else []
        texts += [texts_of_table(table, tokenizer, rollouts, **limits) for table in tables]
    diagnostics = read_diagnostics(config.diagnostics) if config.diagnostics is not None else None
    return run_page(
        run,
        tables=tables,
        dumped=None if tables else dumped_table(run.path),
        texts=texts,
        diagnostics=None if diagnostics is None else diagnostics_section(diagnostics),
        title=config.title,
        made_with=made_with,
    )


def _tokenizer(config: ReportConfig, run: RunDirectory) -> Any | None:
    """The tokenizer asked for, else the student's; None, which the page says, where the run's student is elsewhere."""
    from megatron_taopd.data.tokenizer import load_tokenizer

    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        if tokenizer is None:
            raise ConfigError(f"--tokenizer {config.tokenizer} has no tokenizer files; give a directory that has them")
        return tokenizer
    try:
        return load_tokenizer(str(run.config.get("student")))
    except TaopdError as error:
        print(f"> token ids instead of text: {error}")
        return None


def _suite_page(config: ReportConfig, made_with: str) -> Page:
    from megatron_taopd.report.suite_directory import read_suite
    from megatron_taopd.report.suite_page import suite_page

    return suite_page(read_suite(str(config.suite)), title=config.title, made_with=made_with)
