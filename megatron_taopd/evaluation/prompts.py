"""Problems as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_taopd.data.prompts import Prompt, render_conversation
from megatron_taopd.errors import ConfigError, DataError
from megatron_taopd.evaluation.problems import Problem
from megatron_taopd.evaluation.tasks import Task


def encode_problems(task: Task, tokenizer: Any, *, max_positions: int, source: str) -> list[Prompt]:
    """A prompt a problem, in order.

    Args:
        max_positions: of the model; a prompt and its response must fit.
        source: the model, for messages.

    Raises:
        DataError: a prompt is too long, or the chat template cannot render it.
        ConfigError: the tokenizer has no chat template.
    """
    if task.settings.prompt_style == "chat" and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"task {task.name}: the tokenizer of {source} has no chat template; give --prompt-style raw, perhaps with "
            "a --prompt-template of your own"
        )
    prompts = [_encode(task, problem, tokenizer) for problem in task.problems]
    longest = max(prompts, key=lambda prompt: len(prompt.tokens))
    room = max_positions - task.settings.rollout.max_response_length
    if len(longest.tokens) > room:
        raise DataError(
            f"task {task.name}: the prompt of problem {longest.id!r} has {len(longest.tokens)} tokens; with "
            f"--max-response-length {task.settings.rollout.max_response_length} that is more than the {max_positions} "
            f"positions of {source}; lower it"
        )
    return prompts


def opens_thinking(prompt: Prompt, tokenizer: Any) -> bool:
    """Whether a prompt ends inside ``<think>``, as some chat templates have it."""
    text = tokenizer.decode(prompt.tokens, skip_special_tokens=False)
    return text.rfind("<think>") > text.rfind("</think>")


def _encode(task: Task, problem: Problem, tokenizer: Any) -> Prompt:
    settings = task.settings
    if settings.prompt_style == "raw":
        assert problem.prompt is not None, "conversations were refused"
        tokens = list(tokenizer(problem.prompt)["input_ids"])
        if not tokens:
            raise DataError(f"task {task.name}: the prompt of problem {problem.id!r} has no tokens")
        return Prompt(id=problem.id, tokens=tokens, prompt=problem.prompt)
    messages = _conversation(task, problem)
    where = f"task {task.name}, problem {problem.id!r}"
    tokens = render_conversation(messages, where, tokenizer, settings.chat_template_kwargs)
    return Prompt(id=problem.id, tokens=list(tokens), messages=messages)


def _conversation(task: Task, problem: Problem) -> list[dict[str, Any]]:
    messages: Sequence[dict[str, Any]] = problem.messages or [{"role": "user", "content": problem.prompt}]
    system = task.settings.system_prompt
    if system is None:
        return list(messages)
    if messages[0]["role"] == "system":
        raise DataError(
            f"task {task.name}: problem {problem.id!r} has a system message of its own beside --system-prompt; drop one"
        )
    return [{"role": "system", "content": system}, *messages]
