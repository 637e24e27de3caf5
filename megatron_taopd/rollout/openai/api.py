"""What vLLM and SGLang are sent and what they answer (docs/rollout_servers.md has the versions that this follows).

Every sampling parameter is sent: a server takes those that are missing from the model's ``generation_config.json``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

Json = dict[str, Any]


class MalformedAnswerError(ValueError):
    """The body of an answer is not what the server's API promises."""


class Call(NamedTuple):
    """A POST request."""

    path: str
    body: Json


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How all responses of a run are sampled."""

    max_tokens: int
    temperature: float
    top_p: float
    stop_tokens: Sequence[int]
    """Each ends a response and is its last token."""


@dataclass(frozen=True, kw_only=True)
class ServerAnswer:
    """What a server sampled."""

    tokens: list[int]
    logprobs: list[float]
    """Of the sampled tokens (nats)."""
    finish_reason: Literal["stop", "length", "abort"]
    weights: str | None
    """The server's own tag of the weights, where it gives one."""


class ServerApi(Protocol):
    """Requests and answers of one kind of server."""

    def generate(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Call:
        """Ask for one response."""

    def read_answer(self, body: Json, prompt: Sequence[int]) -> ServerAnswer:
        """The response in an answer to :meth:`generate`.

        Raises:
            MalformedAnswerError: it is none.
        """

    def load_weights(self, directory: str, tag: str) -> list[Call]:
        """Load the weights of an HF directory, in this order."""

    def check_loaded(self, body: Json) -> None:
        """Whether the server says that it has done one of :meth:`load_weights`.

        Raises:
            MalformedAnswerError: it says otherwise.
        """


class VllmApi:
    """``/v1/completions`` with token ids; weights through ``/collective_rpc``, which is there in development mode."""

    def generate(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Call:
        return Call(
            "/v1/completions",
            {
                "prompt": list(prompt),
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "stop_token_ids": list(sampling.stop_tokens),
                "seed": seed,
                "logprobs": 0,  # of the sampled token alone
                "return_token_ids": True,
                "stream": False,
            },
        )

    def read_answer(self, body: Json, prompt: Sequence[int]) -> ServerAnswer:
        choices = body.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise MalformedAnswerError("'choices' is not a list of one")
        choice = choices[0]
        if choice.get("token_ids") is None:
            raise MalformedAnswerError("the choice has no 'token_ids': a vLLM that knows return_token_ids is needed")
        if choice.get("prompt_token_ids") not in (None, list(prompt)):
            raise MalformedAnswerError("'prompt_token_ids' is not the prompt that was sent")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        return _answer(choice["token_ids"], logprobs, choice.get("finish_reason"), None)

    def load_weights(self, directory: str, tag: str) -> list[Call]:
        return [
            Call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": directory}}),
            Call("/reset_prefix_cache", {}),  # keys and values of the old weights
        ]

    def check_loaded(self, body: Json) -> None:
        pass  # it answers an error, or nothing of note


class SglangApi:
    """``/generate`` with token ids; weights through ``/update_weights_from_disk``."""

    def generate(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Call:
        return Call(
            "/generate",
            {
                "input_ids": list(prompt),
                "sampling_params": {
                    "max_new_tokens": sampling.max_tokens,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "top_k": -1,
                    "min_p": 0.0,
                    "repetition_penalty": 1.0,
                    "presence_penalty": 0.0,
                    "frequency_penalty": 0.0,
                    "stop_token_ids": list(sampling.stop_tokens),
                    "sampling_seed": seed,
                },
                "return_logprob": True,
                "stream": False,
            },
        )

    def read_answer(self, body: Json, prompt: Sequence[int]) -> ServerAnswer:
        meta = body.get("meta_info")
        if not isinstance(meta, dict):
            raise MalformedAnswerError("there is no 'meta_info'")
        if meta.get("prompt_tokens") not in (None, len(prompt)):
            raise MalformedAnswerError(
                f"the server read {meta['prompt_tokens']} prompt tokens of the {len(prompt)} that were sent"
            )
        finish = meta.get("finish_reason")
        pairs = meta.get("output_token_logprobs")
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) >= 2 for pair in pairs):
            raise MalformedAnswerError("'meta_info' has no 'output_token_logprobs' of [log-probability, token id, …]")
        weights = meta.get("weight_version")
        return _answer(
            [pair[1] for pair in pairs],
            [pair[0] for pair in pairs],
            finish.get("type") if isinstance(finish, dict) else finish,
            None if weights is None else str(weights),
        )

    def load_weights(self, directory: str, tag: str) -> list[Call]:
        return [Call("/update_weights_from_disk", {"model_path": directory, "weight_version": tag})]

    def check_loaded(self, body: Json) -> None:
        if body.get("success") is not True:
            raise MalformedAnswerError(f"no success: {body.get('message', body)}")


APIS: dict[str, Callable[[], ServerApi]] = {"vllm": VllmApi, "sglang": SglangApi}
"""By ``--rollout-api``."""


def _answer(tokens: Any, logprobs: Any, finish_reason: Any, weights: str | None) -> ServerAnswer:
    if finish_reason not in ("stop", "length", "abort"):
        raise MalformedAnswerError(f"the finish reason is {finish_reason!r}, not stop, length or abort")
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise MalformedAnswerError("the token ids are not a list of whole numbers")
    if not isinstance(logprobs, list) or len(logprobs) != len(tokens):
        count = len(logprobs) if isinstance(logprobs, list) else "no"
        raise MalformedAnswerError(f"there are {count} log-probabilities for {len(tokens)} tokens")
    for number in logprobs:
        # Rounding puts a certain token's log-probability a little above zero.
        if type(number) not in (int, float) or not math.isfinite(number) or number > 1e-3:
            raise MalformedAnswerError(f"{number!r} is no log-probability")
    return ServerAnswer(
        tokens=tokens, logprobs=[float(number) for number in logprobs], finish_reason=finish_reason, weights=weights
    )
