"""The generation loop: prompts are read once, then every sample gets a token a step until it has ended.

Model, pipeline communication and inference context are Megatron's; its loop (``TextGenerationController``) is not
used. That one reads a batch up to its shortest prompt at once and from there token by token, rotates the whole
cache of keys for every token, computes samples that have ended until the last one has, and sends logits between
ranks. U different prompts, B samples still in the batch, L tokens of a forward, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_taopd.models import DistillationGPTModel
from megatron_taopd.models.sample_cache import SampleCache
from megatron_taopd.platform import device, distributed, progress
from megatron_taopd.rollout.megatron.lockstep import announce_forward
from megatron_taopd.rollout.megatron.prefill import prefill_groups
from megatron_taopd.rollout.megatron.products import logits_of
from megatron_taopd.rollout.megatron.wrapper import ModelWrapper, wrap_model
from megatron_taopd.rollout.sampling import choose_tokens, sampling_numbers


@dataclass(kw_only=True)
class Decoding:
    """What is sampled, and when a sample ends."""

    seed: int
    step: int
    vocab_size: int
    """Ids from here on are never sampled."""
    temperature: float
    top_p: float | None
    stop_tokens: Sequence[int]
    """Each ends a sample and is its last token."""
    max_response_length: int
    keep_hidden: bool = False


@dataclass(kw_only=True)
class Answer:
    """The response to one prompt."""

    tokens: list[int]
    logprobs: list[float]
    hidden_TH: torch.Tensor | None
    """Final hidden states that predicted the tokens, on last-stage ranks and if they are kept."""


def generate(
    modules: Sequence[DistillationGPTModel],
    prompts: Sequence[list[int]],
    sample_index: Sequence[int],
    decoding: Decoding,
) -> list[Answer]:
    """One response a prompt, in order. All ranks of a replica call it and get the same.

    Args:
        modules: this rank's part of the model.
        prompts: token ids; equal prompts are read once.
        sample_index: of each prompt, index in the global batch.
    """
    unique = sorted(set(map(tuple, prompts)), key=len)
    place = {prompt: i for i, prompt in enumerate(unique)}
    rows = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device())
    longest = len(unique[-1])
    starts = torch.tensor([longest - len(prompt) for prompt in unique], device=device())
    cache = SampleCache(starts, longest)
    wrapper = wrap_model(modules, cache)
    hidden_UH = _read_prompts(wrapper, unique)
    # The last token that is sampled is not read any more.
    cache.expand(rows, longest + decoding.max_response_length - 1)
    batch = _Batch(modules[-1], torch.tensor(list(sample_index), device=device()), decoding)
    hidden_BH = None if hidden_UH is None else hidden_UH[rows]
    while True:
        progress.beat()
        tokens_B, alive_B = batch.sample(hidden_BH)
        if not bool(alive_B.all()):
            if not bool(alive_B.any()):
                return batch.answers()
            kept_B = cache.keep(alive_B)
            tokens_B = tokens_B[kept_B]
            batch.keep(kept_B)
        announce_forward(modules[-1].config)
        hidden_BH = wrapper.forward_tokens(tokens_B[:, None], first_row=0, slot=cache.sequence_len_offset)


def _read_prompts(wrapper: ModelWrapper, prompts: Sequence[tuple[int, ...]]) -> torch.Tensor | None:
    """Final hidden states [U, H] of the prompts' last tokens; None before the last stage."""
    longest = len(prompts[-1])
    parts = []
    for group in prefill_groups(list(map(len, prompts))):
        width = len(prompts[group.stop - 1])
        padded = [(0,) * (width - len(prompt)) + prompt for prompt in prompts[group]]
        tokens_BL = torch.tensor(padded, device=device())
        announce_forward(wrapper.model.config)
        parts.append(wrapper.forward_tokens(tokens_BL, first_row=group.start, slot=longest - width))
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


class _Batch:
    """Samples that have not ended: their next tokens, and what all have said so far."""

    def __init__(self, model: DistillationGPTModel, sample_index_B: torch.Tensor, decoding: Decoding) -> None:
        self.head_weight = model.head_weight() if model.post_process else None
        self.decoding = decoding
        self.position = 0
        self.num_samples = sample_index_B.numel()
        self.sample_index_B = sample_index_B
        self.original_B = torch.arange(self.num_samples, device=device())
        self.stop_tokens = torch.tensor(list(decoding.stop_tokens), dtype=torch.int64, device=device())
        # Of every step: which samples (as in the call), their tokens and log-probabilities, hidden states.
        self.said: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.hidden: list[torch.Tensor] = []

    def sample(self, hidden_BH: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of every sample [B], and whether the sample goes on [B].

        The last stage samples and tells the others two numbers a sample, so that no two ranks disagree.
        """
        drawn_2B = torch.empty(2, self.original_B.numel(), dtype=torch.float64, device=device())
        if hidden_BH is not None:
            assert self.head_weight is not None
            if self.decoding.keep_hidden:
                self.hidden.append(hidden_BH)
            chosen = self._choose(logits_of(hidden_BH, self.head_weight))
            drawn_2B = torch.stack([part.double() for part in chosen])
        if distributed.pipeline_parallel_size() > 1:
            torch.distributed.broadcast(
                drawn_2B, distributed.last_stage_rank(), group=distributed.pipeline_parallel_group()
            )
        self.said.append((self.original_B, drawn_2B))
        self.position += 1
        tokens_B = drawn_2B[0].long()
        ended_B = torch.isin(tokens_B, self.stop_tokens)
        if self.position == self.decoding.max_response_length:
            ended_B = torch.ones_like(ended_B)
        return tokens_B, ~ended_B

    def _choose(self, logits_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decoding = self.decoding
        position_B = torch.full_like(self.sample_index_B, self.position)
        return choose_tokens(
            logits_BV,
            sampling_numbers(decoding.seed, decoding.step, self.sample_index_B, position_B),
            vocab_size=decoding.vocab_size,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            group=distributed.tensor_parallel_group(),
        )

    def keep(self, kept_B: torch.Tensor) -> None:
        """Go on with these rows, in this order."""
        self.sample_index_B = self.sample_index_B[kept_B]
        self.original_B = self.original_B[kept_B]

    def answers(self) -> list[Answer]:
        """All responses, in the order of the call. What was collected is given up."""
        original_N = torch.cat([original_B for original_B, _ in self.said])
        order_N = original_N.argsort(stable=True)
        drawn_2N = torch.cat([drawn_2B for _, drawn_2B in self.said], 1)[:, order_N]
        lengths = original_N.bincount(minlength=self.num_samples).tolist()
        hidden: Sequence[torch.Tensor | None] = [None] * self.num_samples
        if self.hidden:
            steps, self.hidden = self.hidden, []
            hidden = torch.cat(steps)[order_N].split(lengths)
        tokens, logprobs = drawn_2N[0].long().split(lengths), drawn_2N[1].split(lengths)
        return [
            Answer(tokens=t.tolist(), logprobs=p.tolist(), hidden_TH=h)
            for t, p, h in zip(tokens, logprobs, hidden, strict=True)
        ]
