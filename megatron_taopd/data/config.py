"""Flags of the prompt file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megatron_taopd.errors import ConfigError


@dataclass(kw_only=True)
class DataConfig:
    """Prompts."""

    prompt_data: str | None = None
    """JSONL file of prompts: `prompt` (text), `messages` (a conversation; the chat template is applied) or
    `prompt_tokens` (ids) a line."""
    max_prompt_length: int = 512
    """Prompts of more tokens are left out; how many is logged."""
    chat_template_kwargs: str | None = None
    """JSON object passed to the chat template, such as '{"enable_thinking": false}'."""

    def __post_init__(self) -> None:
        if self.max_prompt_length < 1:
            raise ConfigError(f"--max-prompt-length {self.max_prompt_length} must be at least 1")
        if self.chat_template_kwargs is not None and self.prompt_data is None:
            raise ConfigError(
                f"--chat-template-kwargs {self.chat_template_kwargs} has no effect without --prompt-data; "
                "give a prompt file or drop it"
            )
        self.template_kwargs()

    def template_kwargs(self) -> dict[str, Any]:
        """The parsed ``--chat-template-kwargs``; empty where there are none."""
        if self.chat_template_kwargs is None:
            return {}
        try:
            value = json.loads(self.chat_template_kwargs)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--chat-template-kwargs {self.chat_template_kwargs!r} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ConfigError(
                f"--chat-template-kwargs {self.chat_template_kwargs!r} must be a JSON object such as "
                "'{\"enable_thinking\": false}'"
            )
        return value
