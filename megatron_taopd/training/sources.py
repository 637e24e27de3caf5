"""Where the responses of a step come from; the position in the data is the count of consumed samples alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from megatron_taopd.config import TrainConfig
from megatron_taopd.data.prompts import Prompt, PromptSource, read_prompts
from megatron_taopd.data.records import Rollout, read_rollouts
from megatron_taopd.errors import ConfigError, DataError
from megatron_taopd.platform import distributed
from megatron_taopd.rollout.base import RolloutEngine
from megatron_taopd.rollout.megatron import MegatronEngine
from megatron_taopd.rollout.openai.engine import OpenAIEngine
from megatron_taopd.training.pair import ModelPair


class ResponseSource(Protocol):
    """Responses of a step for this data-parallel replica."""

    def responses(self, *, consumed_samples: int, global_batch_size: int, step: int) -> list[Rollout]:
        """This replica's contiguous share of the global batch; the same on all ranks of the replica."""

    def fingerprint(self) -> str:
        """Of the data that the position counts in; the same on every rank."""

    def figures(self) -> dict[str, float]:
        """Metrics of the last step's responses beside their length; the same on every rank."""


def replica_slice(global_batch_size: int) -> slice:
    """This replica's place in the global batch."""
    share = global_batch_size // distributed.data_parallel_size()
    start = distributed.data_parallel_rank() * share
    return slice(start, start + share)


class GeneratedResponses:
    """Prompts answered by an engine: ``samples_per_prompt`` consecutive samples of the batch share a prompt."""

    def __init__(self, prompts: PromptSource, engine: RolloutEngine, *, samples_per_prompt: int) -> None:
        self.prompts = prompts
        self.engine = engine
        self.samples_per_prompt = samples_per_prompt

    def responses(self, *, consumed_samples: int, global_batch_size: int, step: int) -> list[Rollout]:
        n = self.samples_per_prompt
        batch = self.prompts.batch(consumed_samples // n, global_batch_size // n)
        samples: list[Prompt] = [prompt for prompt in batch for _ in range(n)]
        place = replica_slice(global_batch_size)
        return self.engine.generate(samples[place], step=step, sample_offset=place.start)

    def fingerprint(self) -> str:
        return fingerprint([prompt.tokens for prompt in self.prompts.prompts])

    def figures(self) -> dict[str, float]:
        return self.engine.figures()


class RecordedResponses:
    """Recorded rollouts in file order, starting over at the end of the file."""

    def __init__(self, rollouts: Sequence[Rollout]) -> None:
        self.rollouts = rollouts

    def responses(self, *, consumed_samples: int, global_batch_size: int, step: int) -> list[Rollout]:
        place = replica_slice(global_batch_size)
        indices = range(consumed_samples + place.start, consumed_samples + place.stop)
        return [self.rollouts[i % len(self.rollouts)] for i in indices]

    def fingerprint(self) -> str:
        return fingerprint([[*r.prompt_tokens, -1, *r.response_tokens] for r in self.rollouts])

    def figures(self) -> dict[str, float]:
        return {}


def fingerprint(samples: Sequence[Sequence[int]]) -> str:
    """How many samples, and a short hash of their token ids in order."""
    sha = hashlib.sha256()
    for tokens in samples:
        sha.update(f"{len(tokens)}:{','.join(map(str, tokens))};".encode())
    return f"{len(samples)} samples, {sha.hexdigest()[:16]}"


def even_share(count: int) -> slice:
    """This replica's contiguous share of ``count`` items; shares differ by one at most.

    Raises:
        ConfigError: there are fewer items than replicas.
    """
    replicas, rank = distributed.data_parallel_size(), distributed.data_parallel_rank()
    if count < replicas:
        raise ConfigError(f"{count} responses cannot be shared by {replicas} data-parallel replicas; use fewer ranks")
    return slice(count * rank // replicas, count * (rank + 1) // replicas)


def open_source(config: TrainConfig, pair: ModelPair) -> ResponseSource:
    """The source that ``--rollout-engine`` names.

    Raises:
        DataError: the prompt or rollout file is missing, empty, malformed or does not fit.
        ConfigError: what the engine needs is missing.
    """
    rollout = config.rollout
    if rollout.rollout_engine == "file":
        assert rollout.rollout_data is not None, "RolloutConfig requires it for the file engine"
        rollouts = read_rollouts(
            rollout.rollout_data,
            vocab_size=pair.vocab_size,
            max_response_length=rollout.max_response_length,
            teachers=pair.given_names,
        )
        if config.loss.importance_ratio != "none" and rollouts[0].response_logprobs is None:
            raise DataError(
                f"--importance-ratio {config.loss.importance_ratio} needs the log-probabilities that the responses "
                f"were sampled with, and {rollout.rollout_data} has no 'response_logprobs'"
            )
        return RecordedResponses(rollouts)
    prompts = read_prompts(config.data, pair.tokenizer, teachers=pair.given_names)
    of_pair: dict[str, Any] = dict(seed=config.seed, vocab_size=pair.vocab_size, tokenizer=pair.tokenizer)
    engine: RolloutEngine
    if rollout.rollout_engine == "openai":
        engine = OpenAIEngine(pair.student.hf, rollout, config.rollout_server, **of_pair)
    else:
        keep_hidden = config.scoring.score_from == "rollout"
        engine = MegatronEngine(pair.student, rollout, keep_hidden=keep_hidden, **of_pair)
    return GeneratedResponses(
        PromptSource(prompts, seed=config.seed), engine, samples_per_prompt=rollout.num_samples_per_prompt
    )


def gather_rollouts(local: list[Rollout]) -> list[Rollout] | None:
    """All replicas' responses in global order on rank 0, None elsewhere; all ranks call it."""
    group = distributed.data_parallel_group()
    first = torch.distributed.get_process_group_ranks(group)[0]
    parts: list[list[Rollout]] | None = None
    if distributed.data_parallel_rank() == 0:
        parts = [[] for _ in range(group.size())]
    torch.distributed.gather_object(local, parts, dst=first, group=group)
    if distributed.rank() != 0 or parts is None:
        return None
    return [rollout for part in parts for rollout in part]
