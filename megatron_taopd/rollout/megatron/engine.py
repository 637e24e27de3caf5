"""The live student answers prompts: no copy of its weights, no server."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_taopd.data.prompts import Prompt
from megatron_taopd.data.records import Rollout
from megatron_taopd.errors import ModelError
from megatron_taopd.models import LoadedModel
from megatron_taopd.rollout.config import RolloutConfig
from megatron_taopd.rollout.megatron.generation import Answer, Decoding, generate
from megatron_taopd.rollout.megatron.lockstep import finish_together
from megatron_taopd.rollout.megatron.module_state import ready_for_inference
from megatron_taopd.rollout.megatron.shares import context_share, join_shares
from megatron_taopd.rollout.responses import Responses

DEFAULT_BATCH_SIZE = 64


class MegatronEngine:
    """Generates with megatron-core's model and inference context, at any parallel layout.

    See :class:`megatron_taopd.rollout.base.RolloutEngine`. The module may be in the middle of training,
    inside DistributedDataParallel or not; it is in eval mode while it generates and as it was before
    afterwards. No random generator is read or set.
    """

    def __init__(
        self,
        student: LoadedModel,
        config: RolloutConfig,
        *,
        seed: int,
        vocab_size: int | None = None,
        tokenizer: Any | None = None,
        keep_hidden: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Set up an engine; nothing is allocated before it generates.

        Args:
            vocab_size: ids from here on are never sampled; default: the student's real vocabulary.
            tokenizer: makes the text of the responses; default: that of the student's directory, if it has
                one.
            keep_hidden: rollouts carry the final hidden states that predicted their tokens, on last-stage ranks: H
                numbers a token in the model's type.
            progress: called with responses done and in all after each batch of a ``generate``.

        Raises:
            ConfigError: responses are longer than the student's positions.
        """
        self.student = student
        self.config = config
        self.seed = seed
        self.responses = Responses(student.hf, config, vocab_size=vocab_size, tokenizer=tokenizer)
        self.keep_hidden = keep_hidden
        self.progress = progress

    def generate(self, prompts: Sequence[Prompt], *, step: int, sample_offset: int) -> list[Rollout]:
        """One response a prompt, in order; see the protocol.

        Raises:
            DataError: a prompt has ids outside the vocabulary, or does not fit the student with its response.
            ModelError: the student's logits are not finite.
        """
        self.responses.check(prompts)
        share = context_share(len(prompts))
        prompts, sample_offset = prompts[share], sample_offset + share.start
        decoding = Decoding(
            seed=self.seed,
            step=step,
            vocab_size=self.responses.vocab_size,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            stop_tokens=self.student.hf.eos_token_ids,
            max_response_length=self.config.max_response_length,
            keep_hidden=self.keep_hidden,
        )
        # Like lengths together: the cache is as long as a batch's longest prompt. Equal prompts stay neighbours.
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
        size = self.config.rollout_batch_size or DEFAULT_BATCH_SIZE
        rollouts: dict[int, Rollout] = {}
        with ready_for_inference(torch.nn.ModuleList(self.student.modules)):
            for start in range(0, len(by_length), size):
                batch = by_length[start : start + size]
                answers = generate(
                    self.student.modules,
                    [prompts[i].tokens for i in batch],
                    [sample_offset + i for i in batch],
                    decoding,
                )
                for i, answer in zip(batch, answers, strict=True):
                    rollouts[i] = self._rollout(prompts[i], sample_offset + i, answer)
                if self.progress is not None:
                    self.progress(start + len(batch), len(prompts))
            finish_together(self.student.modules)
        return join_shares(
            [rollouts[i] for i in range(len(prompts))],
            with_hidden=self.keep_hidden,
            hidden_size=self.student.config.hidden_size,
            dtype=self.student.config.params_dtype,
        )

    def figures(self) -> dict[str, float]:
        return {}

    def _rollout(self, prompt: Prompt, sample_index: int, answer: Answer) -> Rollout:
        if not all(map(math.isfinite, answer.logprobs)):
            raise ModelError(
                f"the student's logits are not finite at prompt {prompt.id!r}: its weights are broken or "
                "training diverged (a lower --lr, or --clip-grad)"
            )
        return self.responses.rollout(
            prompt, sample_index, tokens=answer.tokens, logprobs=answer.logprobs, hidden_TH=answer.hidden_TH
        )
