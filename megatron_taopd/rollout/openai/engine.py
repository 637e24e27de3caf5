"""Prompts answered by vLLM or SGLang servers, with the student's weights as they last got them."""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_taopd.data.prompts import Prompt
from megatron_taopd.data.records import Rollout
from megatron_taopd.errors import ConfigError, RolloutError
from megatron_taopd.platform import device, distributed, progress
from megatron_taopd.platform.together import from_rank_zero, raise_together
from megatron_taopd.rollout.config import RolloutConfig
from megatron_taopd.rollout.openai.api import APIS, MalformedAnswerError, Sampling, ServerAnswer
from megatron_taopd.rollout.openai.client import HttpClient
from megatron_taopd.rollout.openai.config import (
    DEFAULT_MAX_IN_FLIGHT,
    DEFAULT_RETRIES,
    DEFAULT_TIMEOUT,
    RolloutServerConfig,
)
from megatron_taopd.rollout.openai.requests import Batch, Counts, Question, Requests, in_threads
from megatron_taopd.rollout.responses import Responses

if TYPE_CHECKING:
    from megatron_taopd.models.hf_config import HFModelConfig

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
"""How long ranks wait before they tell each other that requests are still under way."""


class OpenAIEngine:
    """See :class:`megatron_taopd.rollout.base.RolloutEngine`. One rank of each replica talks to the servers.

    ``weights_iteration`` is the student's iteration whose weights every server has confirmed; 0 where they keep those
    that they were started with; None before the first ones were confirmed. The servers' random numbers are theirs: they
    get a seed a response, and what they make of it is documented in docs/rollout_servers.md.
    """

    def __init__(
        self,
        hf: HFModelConfig,
        config: RolloutConfig,
        servers: RolloutServerConfig,
        *,
        seed: int,
        vocab_size: int | None = None,
        tokenizer: Any | None = None,
    ) -> None:
        """Nothing is sent yet. All ranks call it.

        Args:
            hf: of the student.
            vocab_size, tokenizer: as in :class:`Responses`.

        Raises:
            ConfigError: urllib3 or the API key is missing, fewer requests than replicas may be in flight, or there is
                no room for a prompt.
        """
        assert servers.rollout_api is not None, "RolloutServerConfig.check_against requires it"
        self.responses = Responses(hf, config, vocab_size=vocab_size, tokenizer=tokenizer)
        self.servers = servers
        self.seed = seed
        self.api = APIS[servers.rollout_api]()
        self.weights_iteration: int | None = None if servers.updates else 0
        self.run = from_rank_zero(lambda: uuid.uuid4().hex[:8])
        self._figures: dict[str, float] = {}
        self._step = 0
        self._is_speaker = _is_first_of_replica()
        in_flight = servers.rollout_max_in_flight or DEFAULT_MAX_IN_FLIGHT
        if in_flight < distributed.data_parallel_size():
            raise ConfigError(
                f"--rollout-max-in-flight {in_flight} is less than one request for each of "
                f"{distributed.data_parallel_size()} data-parallel replicas; raise it"
            )
        at_once = in_flight // distributed.data_parallel_size()
        self.retries = DEFAULT_RETRIES if servers.rollout_retries is None else servers.rollout_retries
        self.client = HttpClient(
            servers.rollout_url,
            api_key=servers.api_key(),
            timeout=servers.rollout_timeout or DEFAULT_TIMEOUT,
            retries=self.retries,
            connections=at_once,
        )
        sampling = Sampling(
            max_tokens=config.max_response_length,
            temperature=config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            stop_tokens=hf.eos_token_ids,
        )
        self.requests = Requests(self.client, self.api, sampling, at_once=at_once, why_unusable=self._why_unusable)
        if servers.rollout_api == "vllm" and config.temperature not in (0.0, 1.0):
            logger.info(
                "--temperature %g: vLLM gives log-probabilities at this temperature only with --logprobs-mode "
                "processed_logprobs; rollout_logprob_gap of the metrics shows a difference",
                config.temperature,
            )

    def generate(self, prompts: Sequence[Prompt], *, step: int, sample_offset: int) -> list[Rollout]:
        """One response a prompt, in order; see the protocol. All ranks call it.

        Raises:
            DataError: a prompt has ids outside the vocabulary, or does not fit the student with its response.
            RolloutError: a server does not answer, not as it must, or with weights that are too old; on every rank.
        """
        self.responses.check(prompts)
        why = self.too_old(step)
        if why is not None:
            raise RolloutError(why)
        self._step = step
        batch = None
        if self._is_speaker:
            batch = self.requests.begin(
                [
                    Question(i, prompt.tokens, sample_offset + i, self._seeds(step, sample_offset + i))
                    for i, prompt in enumerate(prompts)
                ]
            )
        _wait_together(batch)
        rollouts = [] if batch is None else [self._rollout(batch, p, i, sample_offset) for i, p in enumerate(prompts)]
        self._figures = _figures_of(batch, rollouts, step)
        return _tell_replica(rollouts)

    def figures(self) -> dict[str, float]:
        return self._figures

    def too_old(self, iteration: int) -> str | None:
        """Why the servers' weights may not answer prompts for the student of this iteration; None: they may."""
        servers, bound = ", ".join(self.client.urls), self.servers.staleness_bound
        if self.weights_iteration is None:
            return f"{servers}: no weights of this run have been loaded yet"
        if bound is not None and iteration - self.weights_iteration > bound:
            return (
                f"{servers}: the weights are {iteration - self.weights_iteration} steps old, more than --max-staleness "
                f"{bound}; the last updates failed"
            )
        return None

    def load_weights(self, directory: str | Path, iteration: int) -> None:
        """Have every server load an HF directory; all ranks call it. Afterwards its iteration is ``weights_iteration``.

        Raises:
            RolloutError: a server does not confirm; on every rank. ``weights_iteration`` stays.
        """
        path = str(Path(directory).resolve())
        loads = [partial(self._load, server, path, self._tag(iteration)) for server in range(len(self.client.urls))]
        _wait_together(in_threads(loads) if distributed.is_rank_zero() else None)
        self.weights_iteration = iteration

    def _load(self, server: int, directory: str, tag: str, counts: Counts) -> None:
        for call in self.api.load_weights(directory, tag):
            body, repeated = self.client.post(server, call)
            counts.repeated += repeated
            try:
                self.api.check_loaded(body)
            except MalformedAnswerError as error:
                url = self.client.urls[server]
                raise RolloutError(f"{url}{call.path} did not load {directory}: {error}") from None

    def _tag(self, iteration: int) -> str:
        return f"taopd-{self.run}-{iteration}"

    def _iteration_of(self, answer: ServerAnswer) -> int | None:
        """The student's iteration behind a response; None where this run did not send the weights."""
        if answer.weights is None or not self.servers.updates:
            return self.weights_iteration
        run, _, iteration = answer.weights.rpartition("-")
        return int(iteration) if run == f"taopd-{self.run}" and iteration.isdigit() else None

    def _why_unusable(self, answer: ServerAnswer) -> str | None:
        config, stops = self.responses.config, self.responses.hf.eos_token_ids
        if answer.finish_reason == "abort" or not answer.tokens:
            return "the server ended the response before its time"
        if max(answer.tokens) >= self.responses.vocab_size:
            return (
                f"the server sampled the id {max(answer.tokens)}, outside the common vocabulary of "
                f"{self.responses.vocab_size} ids"
            )
        if answer.finish_reason == "stop" and answer.tokens[-1] not in stops:
            return (
                f"the server stopped at the id {answer.tokens[-1]}, and the student's stop tokens are {list(stops)}; "
                f"start it with {self.responses.hf.path}"
            )
        if answer.finish_reason == "length" and len(answer.tokens) != config.max_response_length:
            return (
                f"the server cut the response at {len(answer.tokens)} of {config.max_response_length} tokens; start it "
                "with a longer context"
            )
        iteration, bound = self._iteration_of(answer), self.servers.staleness_bound
        if iteration is None:
            return (
                f"the weights behind the response are {answer.weights!r} and not of this run; was a server started "
                "again, or does another run load weights there?"
            )
        if bound is not None and self._step - iteration > bound:
            return (
                f"the weights behind the response are {self._step - iteration} steps old, --max-staleness is {bound}; "
                "do all servers behind this address load the weights?"
            )
        return None

    def _rollout(self, batch: Batch[ServerAnswer], prompt: Prompt, place: int, sample_offset: int) -> Rollout:
        answer = batch.results[place]
        return self.responses.rollout(
            prompt,
            sample_offset + place,
            tokens=answer.tokens,
            logprobs=answer.logprobs,
            policy_iteration=self._iteration_of(answer),
        )

    def _seeds(self, step: int, sample_index: int) -> list[int]:
        """31 bits each, the same wherever the response is asked for."""
        words = [f"{self.seed}/{step}/{sample_index}/{attempt}".encode() for attempt in range(self.retries + 1)]
        return [int.from_bytes(hashlib.sha256(word).digest()[:4], "big") >> 1 for word in words]


def _is_first_of_replica() -> bool:
    first = dist.get_process_group_ranks(distributed.model_parallel_group())[0]
    return distributed.context_parallel_rank() == 0 and distributed.rank() == first


def _wait_together(batch: Batch[Any] | None) -> None:
    """Until what the ranks have under way is done, or a piece of it has failed: on every rank alike."""
    error: Exception | None = None
    pending = batch is not None
    while True:
        if batch is not None and pending:
            try:
                pending = not batch.wait(POLL_SECONDS)
            except Exception as failure:
                error, pending = failure, False
        state = torch.tensor([pending, error is not None], dtype=torch.int32, device=device())
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
        progress.beat()
        if bool(state[1]):
            break
        if not bool(state[0]):
            return
    if batch is not None:
        batch.given_up.set()
    if error is not None and not isinstance(error, RolloutError):
        raise_together(repr(error), RolloutError)
    raise_together(None if error is None else str(error), RolloutError)


def _tell_replica(rollouts: list[Rollout]) -> list[Rollout]:
    """From the rank that asked to the others of its replica."""
    box: list[Any] = [rollouts]
    if distributed.context_parallel_rank() == 0:
        group = distributed.model_parallel_group()
        dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[0], group=group)
    if distributed.context_parallel_size() > 1:
        group = distributed.context_parallel_group()
        dist.broadcast_object_list(box, src=dist.get_process_group_ranks(group)[0], group=group)
    return box[0]


def _figures_of(batch: Batch[ServerAnswer] | None, rollouts: Sequence[Rollout], step: int) -> dict[str, float]:
    """Of all replicas."""
    ages = [step - r.policy_iteration for r in rollouts if r.policy_iteration is not None]
    counts = [0, 0] if batch is None else [batch.counts.dropped, batch.counts.repeated]
    sums = torch.tensor([sum(ages), len(ages), *counts], dtype=torch.float64, device=device())
    oldest = torch.tensor(float(max(ages, default=0)), device=device())
    dist.all_reduce(sums)
    dist.all_reduce(oldest, op=dist.ReduceOp.MAX)
    total, number, dropped, repeated = sums.tolist()
    return {
        "rollout_staleness": total / max(number, 1.0),
        "rollout_staleness_max": float(oldest),
        "rollout_dropped": dropped,
        "rollout_retries": repeated,
    }
