"""Flags of ``taopd eval``."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_taopd.errors import ConfigError
from megatron_taopd.evaluation.options import List, TaskOptions, json_object
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.run_config import PrecisionConfig


@dataclass(kw_only=True)
class HarnessConfig:
    """lm-evaluation-harness, offline, on the model as transformers runs it."""

    harness: List = field(default_factory=list)
    """Task of lm-evaluation-harness: its name, or a YAML file of its format; the flag again for further ones.
    Nothing is downloaded."""
    harness_tasks_dir: str | None = None
    """Directory with further YAML files of tasks, beside those that come with lm-evaluation-harness."""
    harness_data: List = field(default_factory=list)
    """TASK=FILE.jsonl: the task reads this file in place of its data set; the flag again for further ones."""
    harness_limit: int | None = None
    """The first problems of each task (default: all)."""
    harness_num_fewshot: int | None = None
    """Solved examples before each problem (default: the task's own)."""
    harness_batch_size: int | None = None
    """Sequences a forward pass (default: 1)."""
    harness_gen_kwargs: str | None = None
    """JSON object of generation settings, such as '{"max_gen_toks": 2048}' (default: the task's own)."""
    harness_model_args: str | None = None
    """JSON object of further arguments of lm-evaluation-harness's HF model, such as '{"parallelize": true}'."""
    allow_code_execution: bool = False
    """Run the code that the model writes, for tasks such as HumanEval. It runs as you, on this machine: use a container
    without network and without your files."""

    def __post_init__(self) -> None:
        if not self.harness:
            for name, value in vars(self).items():
                if value not in (None, [], False):
                    raise ConfigError(f"--{name.replace('_', '-')} {value} has no effect without --harness; drop it")
        for name in ("harness_limit", "harness_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")
        json_object("harness_gen_kwargs", self.harness_gen_kwargs)
        json_object("harness_model_args", self.harness_model_args)
        self.data_files()

    def data_files(self) -> dict[str, str]:
        """Task to file, of ``--harness-data``."""
        files: dict[str, str] = {}
        for word in self.harness_data:
            task, equals, file = word.partition("=")
            if not equals or not task or not file:
                raise ConfigError(f"--harness-data {word!r} must be TASK=FILE.jsonl")
            if task not in self.harness:
                raise ConfigError(f"--harness-data {word!r} has no effect: {task!r} is not among --harness")
            files[task] = file
        return files


@dataclass(kw_only=True)
class EvalConfig:
    """Answer problems with a model, or judge recorded answers, and say how many are right."""

    output: str
    """Directory for results.json and responses.jsonl."""
    model: str | None = None
    """HF directory, or a Megatron checkpoint directory written by this project."""
    responses: str | None = None
    """Instead of --model: judge these recorded responses (JSONL with problem, response and, of several, task)."""
    task: List = field(default_factory=list)
    """[NAME=]KIND:SOURCE: reasoning_gym:GENERATOR, math:FILE.jsonl, choice:FILE.jsonl, exact:FILE.jsonl; or a YAML file
    with kind, generator or data, and options. The flag again for further tasks."""
    options: TaskOptions = field(default_factory=TaskOptions)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    rollout_batch_size: int | None = None
    """Responses that a replica generates together: bounds the memory of keys and values (default: 64)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    seed: int = 1234
    """Seed of sampling and of the bootstrap."""
    overwrite: bool = False
    """Replace results that --output has already (default: refuse)."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.responses is None):
            raise ConfigError("give --model (to answer) or --responses (to judge recorded answers), one of the two")
        if not self.task and not self.harness.harness:
            raise ConfigError("nothing to evaluate on: give --task, or --harness with --model")
        if self.rollout_batch_size is not None and self.rollout_batch_size < 1:
            raise ConfigError(f"--rollout-batch-size {self.rollout_batch_size} must be at least 1")
        if self.responses is not None:
            self._check_recorded()
        elif not self.task:
            self._check_harness_alone()

    def _check_recorded(self) -> None:
        unused = {
            "--harness": self.harness.harness or None,
            "--rollout-batch-size": self.rollout_batch_size,
            "--bf16": self.precision.bf16 or None,
            "--fp8-format": self.precision.fp8_format,
        }
        for flag, value in unused.items():
            if value is not None:
                raise ConfigError(f"{flag} {value} has no effect with --responses, which are there already; drop it")
        if not self.task:
            raise ConfigError("--responses needs the --task that they answer")

    def _check_harness_alone(self) -> None:
        given = {"rollout_batch_size": self.rollout_batch_size} | self.options.given()
        for name, value in given.items():
            if value is not None and name not in ("prompt_style", "system_prompt"):
                raise ConfigError(f"--{name.replace('_', '-')} {value} has no effect without --task; drop it")
        if self.parallel != ParallelConfig():
            raise ConfigError(f"--harness runs in one process, where a layout has no effect: {self.parallel}; drop it")
        if self.precision.fp8_format is not None:
            raise ConfigError("--fp8-format has no effect on --harness, which runs the model in transformers; drop it")
