"""``taopd eval``."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_taopd.cli import parse
from megatron_taopd.commands.common import announce, configure_logging, ranks
from megatron_taopd.data.tokenizer import load_tokenizer
from megatron_taopd.errors import ConfigError
from megatron_taopd.evaluation.config import EvalConfig
from megatron_taopd.evaluation.summary import refuse_existing, table, versions, write_results
from megatron_taopd.evaluation.tasks import load_tasks
from megatron_taopd.platform.together import from_rank_zero


def evaluate_command(words: Sequence[str]) -> None:
    """Answer problems, or judge recorded answers."""
    config: EvalConfig = parse(EvalConfig, words, name="eval")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    alone = "--harness" if config.harness.harness else "--responses" if config.responses is not None else None
    if alone is not None and world_size > 1:
        raise ConfigError(f"{alone} works in one process and {world_size} were started; run it without torchrun")
    if config.responses is not None:
        configure_logging()
        _judge(config)
        return
    if not config.harness.harness:
        with ranks(config.parallel, seed=config.seed):
            _answer(config)
    else:
        configure_logging()
        _with_harness(config)


def _judge(config: EvalConfig) -> None:
    from megatron_taopd.evaluation.recorded import judge_recorded

    assert config.responses is not None
    refuse_existing(config.output, overwrite=config.overwrite)
    announce(config, "taopd eval", save_to=config.output)
    tasks = load_tasks(config.task, config.options, recorded=True)
    results = judge_recorded(config.responses, tasks, seed=config.seed, output=config.output)
    _show(results, config.output)


def _answer(config: EvalConfig) -> dict[str, Any]:
    """Tasks by the model of this project; process groups exist."""
    from megatron_taopd.evaluation.model import evaluate
    from megatron_taopd.models import fp8_fields, load_hf_config, load_model, refuse_expert_layout_in_vain
    from megatron_taopd.training.pair import params_dtype

    assert config.model is not None
    from_rank_zero(lambda: refuse_existing(config.output, overwrite=config.overwrite))
    announce(config, "taopd eval", save_to=config.output)
    tasks = load_tasks(config.task, config.options)
    hf = load_hf_config(config.model)
    refuse_expert_layout_in_vain(config.parallel, hf)
    model = load_model(
        config.model,
        config.parallel,
        params_dtype=params_dtype(config.precision),
        trainable=False,
        overrides=fp8_fields(config.precision.fp8_settings(), hf, config.parallel, trained=False),
    )
    results = evaluate(
        model,
        tasks,
        seed=config.seed,
        name=config.model,
        rollout_batch_size=config.rollout_batch_size,
        output=config.output,
    )
    from_rank_zero(lambda: _show(results, config.output))
    return results


def _with_harness(config: EvalConfig) -> None:
    """Own tasks, if there are some, then those of lm-evaluation-harness, in one process."""
    from megatron_taopd.evaluation.harness import Harness, as_hf_directory, metrics_of, write_samples
    from megatron_taopd.models.source import hf_directory

    assert config.model is not None
    refuse_existing(config.output, overwrite=config.overwrite)
    hf_directory(config.model)  # refuses what is no model
    chat = config.options.prompt_style != "raw"
    if chat and not getattr(load_tokenizer(config.model), "chat_template", None):
        raise ConfigError(f"the tokenizer of {config.model} has no chat template; give --prompt-style raw")
    harness = Harness(config.harness)
    results: dict[str, Any] = {"model": config.model, "seed": config.seed, "versions": versions(), "tasks": {}}
    if config.task:
        with ranks(config.parallel, seed=config.seed):
            results = _answer(config)
        gc.collect()  # the model of this project makes room
    else:
        announce(config, "taopd eval", save_to=config.output)
    output = Path(config.output)
    with as_hf_directory(config.model, output) as directory:
        found = harness.run(
            directory,
            bf16=config.precision.bf16,
            chat=chat,
            system_prompt=config.options.system_prompt,
            seed=config.seed,
        )
    write_samples(found, output)
    results["harness"] = metrics_of(found)
    write_results(output, results)
    _show_harness(results["harness"], config.output)


def _show(results: dict[str, Any], output: str) -> None:
    print(f"\n{table(results['tasks'])}\n\n> {output}/results.json, {output}/responses.jsonl", flush=True)


def _show_harness(tasks: dict[str, dict[str, Any]], output: str) -> None:
    print()
    for task, metrics in tasks.items():
        for metric, value in metrics.items():
            print(f"{task}  {metric}  {value:g}")
    print(f"\n> {output}/results.json, a file harness_TASK.jsonl a task", flush=True)
