"""A live model answers the problems of tasks."""

from __future__ import annotations

import dataclasses
import logging
import time
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_taopd.data.prompts import Prompt
from megatron_taopd.data.records import Rollout
from megatron_taopd.data.tokenizer import load_tokenizer
from megatron_taopd.errors import ModelError
from megatron_taopd.evaluation.prompts import encode_problems, opens_thinking
from megatron_taopd.evaluation.summary import Judged, OutputDirectory, summarise, verdict_fields, versions
from megatron_taopd.evaluation.tasks import Task
from megatron_taopd.evaluation.verdicts import Judge, Verdict
from megatron_taopd.models import LoadedModel
from megatron_taopd.platform import distributed
from megatron_taopd.platform.together import from_rank_zero
from megatron_taopd.rollout.megatron import MegatronEngine
from megatron_taopd.training.sources import gather_rollouts

logger = logging.getLogger(__name__)


def evaluate(
    model: LoadedModel,
    tasks: Sequence[Task],
    *,
    seed: int,
    name: str | None = None,
    tokenizer: Any | None = None,
    rollout_batch_size: int | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Let a model answer and judge the answers. All ranks call it together, whatever their layout.

    The model may be in the middle of training; see :class:`MegatronEngine`. Responses depend on its weights, the seed,
    the task's name and the problem's and sample's numbers, not on the layout or on other tasks; more samples of a
    problem begin with the same ones.

    Args:
        tasks: of :func:`load_tasks`.
        seed: of sampling and bootstrap.
        name: of the model, for the results (default: its directory).
        tokenizer: default: that of the model's directory.
        rollout_batch_size: responses that a replica generates together.
        output: directory for results.json and responses.jsonl (default: nothing is written).

    Returns:
        The content of results.json, on all ranks; see docs/evaluation.md.

    Raises:
        ConfigError, DataError, ModelError: a task does not fit the model, before anything is generated.
    """
    tokenizer = load_tokenizer(model.hf.path) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ModelError(
            f"{model.hf.path} has no tokenizer, without which no text can be evaluated; copy its files there"
        )
    limit, source = model.hf.max_position_embeddings, str(model.hf.path)
    prompts = [encode_problems(task, tokenizer, max_positions=limit, source=source) for task in tasks]
    judges = [Judge(task) for task in tasks]
    files = from_rank_zero(lambda: None if output is None else OutputDirectory(output))
    started = time.perf_counter()
    results: dict[str, Any] = {
        "model": source if name is None else name,
        "seed": seed,
        "seconds": 0.0,
        "versions": versions(),
        "tasks": {},
    }
    for task, of_task, judge in zip(tasks, prompts, judges, strict=True):
        since = time.perf_counter()
        responses = _answer(model, task, of_task, judge, tokenizer, seed=seed, batch_size=rollout_batch_size)
        results["tasks"][task.name] = from_rank_zero(partial(_conclude, task, responses, files, seed=seed, since=since))
    results["seconds"] = from_rank_zero(lambda: round(time.perf_counter() - started, 3))
    from_rank_zero(lambda: None if files is None else files.finish(results))
    return results


def _answer(
    model: LoadedModel,
    task: Task,
    prompts: list[Prompt],
    judge: Judge,
    tokenizer: Any,
    *,
    seed: int,
    batch_size: int | None,
) -> list[Rollout] | None:
    """All responses with their verdicts on rank 0, the samples of a problem after each other."""
    engine = MegatronEngine(
        model,
        dataclasses.replace(task.settings.rollout, rollout_batch_size=batch_size),
        seed=seed,
        tokenizer=tokenizer,
        progress=_Progress(task.name) if distributed.is_rank_zero() else None,
    )
    # First samples of all problems come first, so that more samples do not change these.
    count, n = len(prompts), task.settings.num_samples
    replicas, replica = distributed.data_parallel_size(), distributed.data_parallel_rank()
    start, stop = (count * n * r // replicas for r in (replica, replica + 1))
    own = [prompts[i % count] for i in range(start, stop)]
    responses = engine.generate(own, step=zlib.crc32(task.name.encode()), sample_offset=start)
    if 0 in dist.get_process_group_ranks(distributed.data_parallel_group()):
        for index, (prompt, response) in enumerate(zip(own, responses, strict=True), start):
            problem, sample = index % count, index // count
            thinking = opens_thinking(prompt, tokenizer)
            verdict = judge(response.response or "", task.problems[problem], thinking=thinking)
            response.id = f"{task.name}/{prompt.id}/{sample}"
            response.extra = verdict_fields(task, problem, sample, verdict) | ({"thinking": True} if thinking else {})
    gathered = gather_rollouts(responses)
    return None if gathered is None else [gathered[j * count + i] for i in range(count) for j in range(n)]


def _conclude(
    task: Task, responses: list[Rollout] | None, files: OutputDirectory | None, *, seed: int, since: float
) -> dict[str, Any]:
    """Rank 0 writes the responses of a task and sums them up."""
    assert responses is not None, "rank 0 has gathered them"
    if files is not None:
        files.add(responses)
    judged = [_judged(response, index // task.settings.num_samples) for index, response in enumerate(responses)]
    result = summarise(task, judged, seed=seed)
    seconds = round(time.perf_counter() - since, 3)
    return result | {"seconds": seconds, "options": task.settings.report(task.kind)}


def _judged(response: Rollout, problem: int) -> Judged:
    extra = response.extra
    verdict = Verdict(answer=extra["answer"], rule=extra["rule"], score=extra["score"], error=extra.get("judge_error"))
    return Judged(
        problem=problem,
        verdict=verdict,
        length=len(response.response_tokens),
        stopped=response.finish_reason == "stop",
    )


class _Progress:
    """Logs how far the generation of a task is, every ten seconds and at the end."""

    def __init__(self, name: str, *, interval: float = 10.0) -> None:
        self._name, self._interval = name, interval
        self._started = self._shown = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._shown < self._interval:
            return
        self._shown = now
        seconds = now - self._started
        left = f", about {seconds * (total - done) / done:.0f} s left" if done < total else ""
        logger.info("%s: %d of %d responses of the first replica, %.0f s%s", self._name, done, total, seconds, left)
