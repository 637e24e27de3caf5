"""Prompts: a JSONL file tokenised once, and the order in which a run goes through them."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_taopd.data import jsonl
from megatron_taopd.data.config import DataConfig
from megatron_taopd.errors import DataError

logger = logging.getLogger(__name__)

_SOURCES = ("prompt", "messages", "prompt_tokens")


@dataclass(kw_only=True)
class Prompt:
    """What the student answers."""

    id: str
    tokens: list[int]
    """At least one."""
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Other keys of the line; rollouts keep them."""


def read_prompts(config: DataConfig, tokenizer: Any | None, *, teachers: Sequence[str] = ()) -> list[Prompt]:
    """Read and tokenise ``config.prompt_data``, in file order, without the prompts that are too long.

    A ``prompt`` is tokenised as it is (with the tokenizer's own BOS, if it adds one); ``messages`` go through
    the chat template, which ends where the assistant begins; ``prompt_tokens`` need no tokenizer.

    Args:
        tokenizer: of transformers, or None for files of ``prompt_tokens``.
        teachers: names of which the 'teacher' of every line must be one, if teachers have names.

    Raises:
        DataError: no file is named, it is missing, empty or malformed, no prompt is short enough, the
            tokenizer is missing or cannot render a conversation, or the template ignores
            ``--chat-template-kwargs``.
    """
    if config.prompt_data is None:
        raise DataError("no prompt file is named; give --prompt-data")
    kwargs = config.template_kwargs()
    prompts: list[Prompt] = []
    longest, num_templated = 0, 0
    lines = list(jsonl.read_objects(config.prompt_data, what="prompts"))
    for index, (where, line) in enumerate(lines):
        jsonl.check_teacher(line, where, teachers)
        prompt = _from_line(line, where, index, tokenizer, kwargs)
        num_templated += prompt.messages is not None and "prompt_tokens" not in line
        longest = max(longest, len(prompt.tokens))
        if len(prompt.tokens) <= config.max_prompt_length:
            prompts.append(prompt)
    if kwargs and not num_templated:
        raise DataError(
            f"--chat-template-kwargs {config.chat_template_kwargs} has no effect: no line of "
            f"{config.prompt_data} has 'messages', to which alone the chat template is applied"
        )
    if not prompts:
        raise DataError(
            f"{config.prompt_data}: all {len(lines)} prompts have more than --max-prompt-length "
            f"{config.max_prompt_length} tokens (longest: {longest}); raise the limit"
        )
    if len(prompts) < len(lines):
        logger.warning(
            "%s: left out %d of %d prompts, which have more than --max-prompt-length %d tokens (longest: %d)",
            config.prompt_data,
            len(lines) - len(prompts),
            len(lines),
            config.max_prompt_length,
            longest,
        )
    return prompts


def _from_line(line: dict[str, Any], where: str, index: int, tokenizer: Any | None, kwargs: dict[str, Any]) -> Prompt:
    given = [key for key in _SOURCES if key in line]
    if not given:
        raise DataError(f"{where}: no prompt; a line needs 'prompt', 'messages' or 'prompt_tokens'")
    if "prompt" in given and "messages" in given:
        raise DataError(f"{where}: both 'prompt' and 'messages'; leave one out")
    prompt = jsonl.text(line["prompt"], where, "prompt") if "prompt" in line else None
    messages = jsonl.conversation(line["messages"], where) if "messages" in line else None
    if "prompt_tokens" in line:
        tokens = jsonl.token_ids(line["prompt_tokens"], where, "prompt_tokens")
    elif tokenizer is None:
        raise DataError(
            f"{where}: '{given[0]}' is text, and neither model directory has a tokenizer; copy the tokenizer "
            "files there or give 'prompt_tokens'"
        )
    elif messages is not None:
        tokens = render_conversation(messages, where, tokenizer, kwargs)
    else:
        tokens = tokenizer(prompt)["input_ids"]
    if not tokens:
        raise DataError(f"{where}: the prompt has no tokens")
    return Prompt(
        id=str(line.get("id", index)),
        tokens=list(tokens),
        prompt=prompt,
        messages=messages,
        extra={key: value for key, value in line.items() if key not in (*_SOURCES, "id")},
    )


def render_conversation(
    messages: list[dict[str, Any]], where: str, tokenizer: Any, kwargs: dict[str, Any]
) -> list[int]:
    """Token ids of a conversation in the chat template, which ends where the assistant begins.

    Args:
        where: begins the message.
        kwargs: passed to the template.

    Raises:
        DataError: the template cannot render it, or ignores one of ``kwargs``.
    """
    # The template writes the special tokens itself.
    try:
        template = tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
    except Exception as error:  # templates raise whatever jinja or their author chose
        raise DataError(f"{where}: the chat template cannot render 'messages': {error}") from error
    ignored = [name for name in kwargs if not re.search(rf"\b{re.escape(name)}\b", template)]
    if ignored:
        raise DataError(
            "--chat-template-kwargs: the chat template of this tokenizer does not know "
            f"{', '.join(ignored)}, which would have no effect; drop it"
        )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class PromptSource:
    """An endless sequence of prompts; the order of an epoch depends on the seed and the epoch alone.

    The place in it is the number of prompts consumed, so a run resumes from that number.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        if not prompts:
            raise DataError("there are no prompts")
        self.prompts = prompts
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def batch(self, consumed: int, count: int) -> list[Prompt]:
        """The ``count`` prompts that follow the first ``consumed`` ones."""
        size = len(self.prompts)
        chosen = []
        for position in range(consumed, consumed + count):
            epoch, place = divmod(position, size)
            chosen.append(self.prompts[self._order_of(epoch)[place]])
        return chosen

    def _order_of(self, epoch: int) -> list[int]:
        if epoch != self._epoch:
            self._order = list(range(len(self.prompts)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        return self._order
