"""Options of a task: as flags they hold for all tasks, in a task's YAML file for that one; flags win."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from megatron_taopd.errors import ConfigError
from megatron_taopd.evaluation.extraction import RULES
from megatron_taopd.registry import resolve
from megatron_taopd.rollout.config import RolloutConfig

REASONING_GYM, CHOICE = "reasoning_gym", "choice"
KINDS = (REASONING_GYM, "math", CHOICE, "exact")

_BOXED_FIRST = ("boxed", "answer_tag", "final_answer", "last_line")
_TAG_FIRST = ("answer_tag", "boxed", "last_line")
_EXTRACT = {"math": _BOXED_FIRST, CHOICE: _BOXED_FIRST}
_TEMPLATES = {
    REASONING_GYM: "{problem}\n\nWrite the final answer, and nothing else, between <answer> and </answer>.",
    "math": "{problem}\n\nPut the final answer in \\boxed{}.",
    CHOICE: "{problem}\n\n{choices}\n\nPut the letter of the right choice in \\boxed{}.",
}
DEFAULT_SIZE = 100

List = Annotated[list[str], tyro.conf.UseAppendAction]


@dataclass(kw_only=True)
class TaskOptions:
    """Problems, prompts, sampling and answers; also keys of a task's YAML file, beside name, kind, generator, data."""

    size: int | None = None
    """Problems: that many of a reasoning-gym generator (default: 100), the first of a file (default: all)."""
    problem_seed: int | None = None
    """Seed of reasoning-gym's problems and of the order of choices (default: 0). Apart from --seed, so that other
    samples answer the same problems."""
    generator_settings: str | None = None
    """JSON object of a reasoning-gym generator's own settings, such as '{"min_terms": 2, "max_terms": 2}'."""
    prompt_field: str | None = None
    """Field of a file's lines with the problem: text, or a conversation (default: problem)."""
    answer_field: str | None = None
    """Field with the right answer (default: answer). Of a choice: its letter, its index from 0, or its text."""
    id_field: str | None = None
    """Field with a problem's name (default: id, else the number of the line)."""
    choices_field: List = field(default_factory=list)
    """Field with the list of choices (default: choices), or the flag again for each of several fields with one."""
    shuffle_choices: bool = False
    """Put the choices in an order drawn from --problem-seed and the problem's name."""
    prompt_style: Literal["chat", "raw"] | None = None
    """chat (the default): the prompt is the user's message in the tokenizer's chat template. raw: it is read as is."""
    prompt_template: str | None = None
    """Text around {problem} (and {choices}); the default asks for the answer where --extract looks first."""
    system_prompt: str | None = None
    """Message before the user's."""
    chat_template_kwargs: str | None = None
    """JSON object passed to the chat template, such as '{"enable_thinking": false}'."""
    extract: List = field(default_factory=list)
    """Rule that finds the answer; the flag again for further ones, tried in order: answer_tag, boxed, final_answer,
    last_line, last_number, whole, or your own as pkg.module:function."""
    num_samples: int | None = None
    """Responses to each problem (default: 1)."""
    temperature: float | None = None
    """Divides the logits before sampling; 0, the default, takes the likeliest token."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability (default: from all)."""
    max_response_length: int | None = None
    """Tokens after which a response is cut (default: 1024)."""

    def given(self) -> dict[str, Any]:
        """The options that are set."""
        return {
            name: value for name, value in vars(self).items() if not (value is None or value is False or value == [])
        }


_OF_GENERATORS = {"generator_settings"}
_OF_FILES = {"prompt_field", "answer_field", "id_field"}
_OF_CHOICES = {"choices_field", "shuffle_choices"}
# What a model is given and how it is sampled: of no effect on responses that are there already.
OF_GENERATION = {
    "prompt_style",
    "prompt_template",
    "system_prompt",
    "chat_template_kwargs",
    "num_samples",
    "temperature",
    "top_p",
    "max_response_length",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The resolved options of one task."""

    size: int | None
    problem_seed: int
    generator_settings: dict[str, Any]
    prompt_field: str
    answer_field: str
    id_field: str | None
    choices_field: tuple[str, ...]
    shuffle_choices: bool
    prompt_style: str
    prompt_template: str | None
    system_prompt: str | None
    chat_template_kwargs: dict[str, Any]
    extract: tuple[str, ...]
    num_samples: int
    rollout: RolloutConfig

    def template(self, kind: str) -> str:
        """The text around a problem."""
        return _TEMPLATES.get(kind, "{problem}") if self.prompt_template is None else self.prompt_template

    def report(self, kind: str) -> dict[str, Any]:
        """What has an effect on this kind of task, for the results."""
        values = {**vars(self), "prompt_template": self.template(kind)}
        rollout: RolloutConfig = values.pop("rollout")
        for name in ("temperature", "top_p", "max_response_length"):
            values[name] = getattr(rollout, name)
        return {name: value for name, value in values.items() if name in applicable(kind)}


def applicable(kind: str) -> set[str]:
    """Names of the options that mean something to a kind of task."""
    names = {f.name for f in dataclasses.fields(TaskOptions)}
    if kind == REASONING_GYM:
        return names - _OF_FILES - _OF_CHOICES
    names -= _OF_GENERATORS
    return names if kind == CHOICE else names - _OF_CHOICES - {"problem_seed"}


def resolve_options(kind: str, flags: TaskOptions, of_file: TaskOptions, *, where: str) -> Settings:
    """The settings of a task: what is given by flag, else in its file, else the default.

    Args:
        where: begins the messages.

    Raises:
        ConfigError: a value is impossible, or one of the file has no effect.
    """
    known = applicable(kind)
    for name in of_file.given():
        if name not in known:
            raise ConfigError(f"{where}: {name} has no effect on a task of kind {kind}; drop it")
    given = of_file.given() | {name: value for name, value in flags.given().items() if name in known}
    settings = Settings(
        size=_at_least_one("size", given.get("size", DEFAULT_SIZE if kind == REASONING_GYM else None)),
        problem_seed=given.get("problem_seed", 0),
        generator_settings=json_object("generator_settings", given.get("generator_settings")),
        prompt_field=given.get("prompt_field", "problem"),
        answer_field=given.get("answer_field", "answer"),
        id_field=given.get("id_field"),
        choices_field=tuple(given.get("choices_field", ["choices"])),
        shuffle_choices=given.get("shuffle_choices", False),
        prompt_style=given.get("prompt_style", "chat"),
        prompt_template=given.get("prompt_template"),
        system_prompt=given.get("system_prompt"),
        chat_template_kwargs=json_object("chat_template_kwargs", given.get("chat_template_kwargs")),
        extract=tuple(given.get("extract", _EXTRACT.get(kind, _TAG_FIRST))),
        num_samples=_at_least_one("num_samples", given.get("num_samples", 1)) or 1,
        rollout=RolloutConfig(
            temperature=given.get("temperature", 0.0),
            top_p=given.get("top_p"),
            max_response_length=given.get("max_response_length", 1024),
        ),
    )
    _check(kind, settings, where)
    return settings


def refuse_flags_in_vain(flags: TaskOptions, kinds: list[str], *, recorded: bool) -> None:
    """Refuse a flag that no task reads.

    Args:
        recorded: the responses are there already.

    Raises:
        ConfigError: there is one.
    """
    read = set().union(*map(applicable, kinds)) - (OF_GENERATION if recorded else set())
    for name, value in flags.given().items():
        if name not in read:
            why = "--responses, which are there already" if recorded and kinds else f"tasks of kind {', '.join(kinds)}"
            raise ConfigError(f"{_flag(name)} {value} has no effect on {why}; drop it")


def json_object(name: str, text: Any) -> dict[str, Any]:
    """The JSON object that a flag gives; empty without it.

    Raises:
        ConfigError: it is no JSON object.
    """
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, TypeError) as error:
        raise ConfigError(f"{_flag(name)} {text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{_flag(name)} {text!r} must be a JSON object such as '{{\"key\": 2}}'")
    return value


def _check(kind: str, settings: Settings, where: str) -> None:
    template = settings.template(kind)
    if "{problem}" not in template:
        raise ConfigError(f"{where}: --prompt-template {template!r} has no {{problem}}, so the model would not see it")
    if ("{choices}" in template) != (kind == CHOICE):
        need = "needs {choices}" if kind == CHOICE else "has {choices}, which a task of this kind has not"
        raise ConfigError(f"{where}: --prompt-template {template!r} {need}")
    if settings.prompt_style == "raw":
        for name in ("system_prompt", "chat_template_kwargs"):
            if value := getattr(settings, name):
                raise ConfigError(f"{where}: {_flag(name)} {value!r} has no effect with --prompt-style raw; drop it")
    for rule in settings.extract:
        resolve("--extract rule", rule, RULES)
    if settings.num_samples > 1 and settings.rollout.temperature == 0:
        raise ConfigError(
            f"{where}: --num-samples {settings.num_samples} would be the same response again and again at "
            "--temperature 0; give a temperature above 0, or one sample"
        )


def _at_least_one(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ConfigError(f"{_flag(name)} {value} must be at least 1")
    return value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
