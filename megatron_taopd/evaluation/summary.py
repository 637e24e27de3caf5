"""Results of a task from its verdicts, the files they are written to, and the table."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_taopd import __version__
from megatron_taopd.data.records import Rollout, to_line
from megatron_taopd.errors import ConfigError
from megatron_taopd.evaluation.estimates import bootstrap_interval, ks_of, pass_at_k
from megatron_taopd.evaluation.tasks import Task
from megatron_taopd.evaluation.verdicts import Verdict

RESULTS, RESPONSES = "results.json", "responses.jsonl"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A response with its verdict."""

    problem: int
    """Index of the problem in its task."""
    verdict: Verdict
    length: int | None
    """Tokens, the stop token included."""
    stopped: bool | None
    """Whether it ended by itself."""


def summarise(task: Task, judged: Sequence[Judged], *, seed: int) -> dict[str, Any]:
    """The numbers of a task; see docs/evaluation.md for every key.

    Args:
        judged: equally many samples of every problem.
        seed: of the bootstrap.
    """
    count, samples = len(task.problems), len(judged) // len(task.problems)
    correct = [0] * count
    for one in judged:
        correct[one.problem] += one.verdict.correct
    chances = {}
    for k in ks_of(samples):
        values = [pass_at_k(samples, c, k) for c in correct]
        chances[str(k)] = {"value": sum(values) / count, "interval": bootstrap_interval(values, seed=seed)}
    lengths = [one.length for one in judged if one.length is not None]
    stops = [one.stopped for one in judged if one.stopped is not None]
    return {
        "kind": task.kind,
        "problems": count,
        "distinct_problems": len({problem.text for problem in task.problems}),
        "samples": samples,
        "pass@1": chances["1"]["value"],
        "mean@n": chances["1"]["value"],
        "interval": chances["1"]["interval"],
        "pass@k": chances,
        "mean_score": _mean([one.verdict.score for one in judged]),
        "mean_response_length": _mean(lengths) if len(lengths) == len(judged) else None,
        "stop_share": _mean(stops) if len(stops) == len(judged) else None,
        "answered_share": _mean([one.verdict.answer is not None for one in judged]),
        "judge_errors": sum(one.verdict.error is not None for one in judged),
    }


def verdict_fields(task: Task, problem: int, sample: int, verdict: Verdict) -> dict[str, Any]:
    """What a line of the responses tells beside the rollout."""
    return {
        "task": task.name,
        "problem": task.problems[problem].id,
        "sample": sample,
        "gold": task.problems[problem].gold,
        "answer": verdict.answer,
        "rule": verdict.rule,
        "score": verdict.score,
        "correct": verdict.correct,
        **({} if verdict.error is None else {"judge_error": verdict.error}),
    }


def versions() -> dict[str, str]:
    """Of what makes the problems, the responses and the verdicts, where it is installed."""
    found = {"megatron_taopd": __version__}
    for name in ("torch", "megatron-core", "transformers", "reasoning-gym", "math-verify", "lm-eval"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class OutputDirectory:
    """Where an evaluation is written. Responses are there task by task, the results at the end."""

    def __init__(self, path: str | Path) -> None:
        """Make the directory.

        Raises:
            ConfigError: it cannot be made.
        """
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._partial = self.path / f"{RESPONSES}.partial"
            self._partial.write_text("")
        except OSError as error:
            raise ConfigError(f"--output {path} cannot be written to: {error}") from error

    def add(self, lines: Sequence[dict[str, Any] | Rollout]) -> None:
        """Append the responses of a task."""
        with self._partial.open("a", encoding="utf-8") as file:
            for line in lines:
                value = to_line(line) if isinstance(line, Rollout) else line
                file.write(json.dumps(value, ensure_ascii=False) + "\n")

    def finish(self, results: dict[str, Any]) -> None:
        """Write the results, and give both files their names."""
        os.replace(self._partial, self.path / RESPONSES)
        write_results(self.path, results)


def write_results(directory: Path, results: dict[str, Any]) -> None:
    """Write results.json, aside first and then by rename."""
    partial = directory / f"{RESULTS}.partial"
    partial.write_text(json.dumps(results, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, directory / RESULTS)


def refuse_existing(path: str | Path, *, overwrite: bool) -> None:
    """Refuse a directory that holds results already.

    Raises:
        ConfigError: it does, and they are not to be replaced.
    """
    if (Path(path) / RESULTS).exists() and not overwrite:
        raise ConfigError(f"--output {path} has a {RESULTS} already; name another directory, or give --overwrite")


def table(tasks: dict[str, dict[str, Any]]) -> str:
    """The results of all tasks for people."""
    header = ["task", "problems", "n", "pass@1 = mean@n", "95 % interval", "pass@n", "answered", "length", "stopped"]
    rows = [header]
    for name, result in tasks.items():
        low_high = result["interval"]
        n = result["samples"]
        rows.append(
            [
                name,
                str(result["problems"]),
                str(n),
                f"{result['pass@1']:.3f}",
                "-" if low_high is None else f"{low_high[0]:.3f} .. {low_high[1]:.3f}",
                f"{result['pass@k'][str(n)]['value']:.3f}",
                f"{result['answered_share']:.0%}",
                "-" if result["mean_response_length"] is None else f"{result['mean_response_length']:.1f}",
                "-" if result["stop_share"] is None else f"{result['stop_share']:.0%}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
