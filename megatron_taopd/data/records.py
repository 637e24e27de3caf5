"""Rollouts: responses with their prompts as token ids, and the JSONL they are kept in."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_taopd.data import jsonl
from megatron_taopd.errors import DataError

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length"]


@dataclass(kw_only=True)
class Rollout:
    """One response. Token ids are all that scoring and training read."""

    id: str
    prompt_tokens: list[int]
    """At least one."""
    response_tokens: list[int]
    """At least one; the stop token, if it was sampled, is the last."""
    response_logprobs: list[float] | None = None
    """log p of each response token when it was sampled, at the sampling temperature (nats)."""
    finish_reason: FinishReason | None = None
    """``stop``: the last token is a stop token; ``length``: the limit ended it; None: not recorded."""
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    response: str | None = None
    """Text of the response, for people."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Other keys of the line, kept as they are."""
    policy_iteration: int | None = None
    """Training steps behind the weights that wrote the response, where a server tells them."""
    hidden_TH: torch.Tensor | None = field(default=None, compare=False, repr=False)
    """[response tokens, H] in the model's dtype: the student's final hidden state, after the final norm, that predicted
    each response token. On last-pipeline-stage ranks of an engine that was asked for it, replicated over
    tensor-parallel ranks; never written."""


def read_rollouts(
    path: str | Path,
    *,
    vocab_size: int | None = None,
    max_response_length: int | None = None,
    teachers: Sequence[str] = (),
) -> list[Rollout]:
    """Read recorded rollouts, in file order.

    Args:
        vocab_size: ids from here on are refused.
        max_response_length: longer responses are refused (tokens).
        teachers: names of which the 'teacher' of every line must be one, if teachers have names.

    Raises:
        DataError: the file is missing or empty, or a line is malformed; the message starts with
            file and line.
    """
    rollouts: list[Rollout] = []
    for where, line in jsonl.read_objects(path, what="rollouts"):
        jsonl.check_teacher(line, where, teachers)
        rollout = _from_line(line, where, index=len(rollouts), vocab_size=vocab_size)
        length = len(rollout.response_tokens)
        if max_response_length is not None and length > max_response_length:
            raise DataError(
                f"{where}: the response of {rollout.id!r} has {length} tokens, more than "
                f"--max-response-length {max_response_length}; raise the limit or record shorter responses"
            )
        if rollouts and (rollouts[0].response_logprobs is None) != (rollout.response_logprobs is None):
            raise DataError(
                f"{where}: 'response_logprobs' must be on every line or on none; {rollout.id!r} differs from "
                "the lines before"
            )
        rollouts.append(rollout)
    return rollouts


def write_rollouts(path: str | Path, rollouts: Iterable[Rollout]) -> None:
    """Write rollouts as JSONL, aside first and then by rename. Fields that are None are left out."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for rollout in rollouts:
            file.write(json.dumps(to_line(rollout), ensure_ascii=False) + "\n")
    os.replace(partial, path)


def to_line(rollout: Rollout) -> dict[str, Any]:
    """The JSON object of a rollout."""
    line = {name: getattr(rollout, name) for name in _FIELDS}
    return {name: value for name, value in line.items() if value is not None} | rollout.extra


# In the order of a written line; also the keys that Rollout.extra cannot have.
_FIELDS = (
    "id",
    "prompt",
    "messages",
    "response",
    "finish_reason",
    "prompt_tokens",
    "response_tokens",
    "response_logprobs",
    "policy_iteration",
)


def _from_line(line: dict[str, Any], where: str, *, index: int, vocab_size: int | None) -> Rollout:
    for key in ("prompt_tokens", "response_tokens"):
        if key not in line:
            raise DataError(f"{where}: '{key}' is missing; a rollout needs 'prompt_tokens' and 'response_tokens'")
    response_tokens = jsonl.token_ids(line["response_tokens"], where, "response_tokens", vocab_size=vocab_size)
    finish_reason = line.get("finish_reason")
    if finish_reason not in (None, "stop", "length"):
        raise DataError(f"{where}: 'finish_reason' must be 'stop' or 'length', not {finish_reason!r}")
    prompt, response, messages = (line.get(key) for key in ("prompt", "response", "messages"))
    return Rollout(
        id=str(line.get("id", index)),
        prompt_tokens=jsonl.token_ids(line["prompt_tokens"], where, "prompt_tokens", vocab_size=vocab_size),
        response_tokens=response_tokens,
        response_logprobs=_logprobs(line.get("response_logprobs"), where, len(response_tokens)),
        finish_reason=finish_reason,
        prompt=None if prompt is None else jsonl.text(prompt, where, "prompt"),
        messages=None if messages is None else jsonl.conversation(messages, where),
        response=None if response is None else jsonl.text(response, where, "response"),
        policy_iteration=_iteration(line.get("policy_iteration"), where),
        extra={key: value for key, value in line.items() if key not in _FIELDS},
    )


def _iteration(value: Any, where: str) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise DataError(f"{where}: 'policy_iteration' must be a whole number from 0 on, not {value!r}")
    return value


def _logprobs(value: Any, where: str, num_tokens: int) -> list[float] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(v) in (int, float) for v in value):
        raise DataError(f"{where}: 'response_logprobs' must be a list of numbers")
    if len(value) != num_tokens:
        raise DataError(
            f"{where}: {len(value)} 'response_logprobs' for {num_tokens} 'response_tokens'; there must be one a token"
        )
    for number in value:
        # Rounding puts a certain token's log-probability a little above zero.
        if not math.isfinite(number) or number > 1e-3:
            raise DataError(f"{where}: 'response_logprobs' has {number}, which is no log-probability")
    return [float(v) for v in value]
