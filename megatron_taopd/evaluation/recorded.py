"""Responses that are there already get their verdicts, by the same path as generated ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_taopd.data import jsonl
from megatron_taopd.errors import DataError
from megatron_taopd.evaluation.options import OF_GENERATION
from megatron_taopd.evaluation.summary import Judged, OutputDirectory, summarise, verdict_fields, versions
from megatron_taopd.evaluation.tasks import Task
from megatron_taopd.evaluation.verdicts import Judge


@dataclass(frozen=True, kw_only=True)
class RecordedResponse:
    """A line of a responses file."""

    where: str
    line: dict[str, Any]
    text: str
    problem: str


def judge_recorded(
    path: str | Path, tasks: Sequence[Task], *, seed: int, name: str | None = None, output: str | Path | None = None
) -> dict[str, Any]:
    """Judge recorded responses.

    Args:
        path: JSON Lines as ``responses.jsonl``; needed are ``problem`` (its id) and ``response``, and ``task`` where
            there are several tasks.
        tasks: of :func:`load_tasks`.
        seed: of the bootstrap.
        name: of the model, for the results (default: the file).
        output: directory for results.json and responses.jsonl (default: nothing is written).

    Returns:
        The content of results.json.

    Raises:
        DataError: the file is malformed, or its responses do not belong to the problems, equally many to each.
    """
    by_task = _read(path, tasks)
    matched = {task.name: _match(path, task, by_task.pop(task.name, [])) for task in tasks}
    for unknown, responses in by_task.items():
        raise DataError(
            f"{responses[0].where}: the response belongs to task {unknown!r}, which is not among "
            f"{', '.join(matched)}; give its --task too, or take the lines out"
        )
    files = None if output is None else OutputDirectory(output)
    results: dict[str, Any] = {
        "model": str(path) if name is None else name,
        "seed": seed,
        "seconds": 0.0,
        "versions": versions(),
        "tasks": {},
    }
    for task in tasks:
        judge = Judge(task)
        judged, lines = [], []
        for problem, responses in enumerate(matched[task.name]):
            for sample, response in enumerate(responses):
                thinking = bool(response.line.get("thinking"))
                verdict = judge(response.text, task.problems[problem], thinking=thinking)
                judged.append(Judged(problem=problem, verdict=verdict, **_length_and_stop(response)))
                kept = {key: value for key, value in response.line.items() if key != "judge_error"}
                lines.append(kept | verdict_fields(task, problem, sample, verdict))
        if files is not None:
            files.add(lines)
        options = task.settings.report(task.kind)
        options = {name: value for name, value in options.items() if name not in OF_GENERATION}
        results["tasks"][task.name] = summarise(task, judged, seed=seed) | {"seconds": 0.0, "options": options}
    if files is not None:
        files.finish(results)
    return results


def _read(path: str | Path, tasks: Sequence[Task]) -> dict[str, list[RecordedResponse]]:
    by_task: dict[str, list[RecordedResponse]] = defaultdict(list)
    for where, line in jsonl.read_objects(path, what="responses"):
        for key in ("problem", "response"):
            if key not in line:
                raise DataError(f"{where}: '{key}' is missing; a response needs 'problem' (its id) and 'response'")
        if "task" not in line and len(tasks) > 1:
            raise DataError(f"{where}: 'task' is missing; with several tasks a response names its own")
        by_task[str(line.get("task", tasks[0].name))].append(
            RecordedResponse(
                where=where,
                line=line,
                text=jsonl.text(line["response"], where, "response"),
                problem=str(line["problem"]),
            )
        )
    return by_task


def _match(path: str | Path, task: Task, responses: Sequence[RecordedResponse]) -> list[list[RecordedResponse]]:
    """The responses to each problem, in the order of the file."""
    place = {problem.id: index for index, problem in enumerate(task.problems)}
    matched: list[list[RecordedResponse]] = [[] for _ in task.problems]
    for response in responses:
        if response.problem not in place:
            raise DataError(
                f"{response.where}: task {task.name} has no problem {response.problem!r} among its {len(place)}; were "
                "the responses made with another --size or file?"
            )
        matched[place[response.problem]].append(response)
    counts = {len(some) for some in matched}
    if len(counts) > 1 or 0 in counts:
        problem = min(range(len(matched)), key=lambda i: len(matched[i]))
        raise DataError(
            f"{path}: problem {task.problems[problem].id!r} of task {task.name} has {len(matched[problem])} responses "
            f"and another has {max(counts)}; every problem needs equally many, at least one"
        )
    return matched


def _length_and_stop(response: RecordedResponse) -> dict[str, Any]:
    tokens, reason = response.line.get("response_tokens"), response.line.get("finish_reason")
    if tokens is not None:
        jsonl.token_ids(tokens, response.where, "response_tokens")
    if reason not in (None, "stop", "length"):
        raise DataError(f"{response.where}: 'finish_reason' must be 'stop' or 'length', not {reason!r}")
    return {
        "length": None if tokens is None else len(tokens),
        "stopped": None if reason is None else reason == "stop",
    }
