"""What all engines do with a prompt before, and with tokens after."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_taopd.data.prompts import Prompt
from megatron_taopd.data.records import Rollout
from megatron_taopd.data.tokenizer import load_tokenizer
from megatron_taopd.errors import ConfigError, DataError
from megatron_taopd.rollout.config import RolloutConfig

if TYPE_CHECKING:
    import torch

    from megatron_taopd.models.hf_config import HFModelConfig

logger = logging.getLogger(__name__)


class Responses:
    """Of one student: which prompts it can answer, and its tokens as rollouts."""

    def __init__(
        self, hf: HFModelConfig, config: RolloutConfig, *, vocab_size: int | None = None, tokenizer: Any | None = None
    ) -> None:
        """Check that there is room for a prompt.

        Args:
            vocab_size: ids from here on are in no prompt and no response; default: the student's real vocabulary.
            tokenizer: makes the text of the responses; default: that of the student's directory, if it has one.

        Raises:
            ConfigError: responses are longer than the student's positions.
        """
        limit = hf.max_position_embeddings
        if config.max_response_length >= limit:
            raise ConfigError(
                f"--max-response-length {config.max_response_length} leaves no room for a prompt: "
                f"{hf.path} has {limit} positions; lower it"
            )
        self.hf = hf
        self.config = config
        self.vocab_size = min(vocab_size or hf.vocab_size, hf.vocab_size)
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(hf.path)
        if not hf.eos_token_ids:
            logger.warning(
                "%s names no stop token (eos_token_id of generation_config.json or config.json): every "
                "response will have --max-response-length %d tokens",
                hf.path,
                config.max_response_length,
            )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that the student cannot answer.

        Raises:
            DataError: ids are outside the vocabulary, or a prompt does not fit the student with its response.
        """
        for prompt in prompts:
            highest = max(prompt.tokens)
            if highest >= self.vocab_size:
                raise DataError(
                    f"prompt {prompt.id!r} has the token id {highest}, outside the vocabulary of "
                    f"{self.vocab_size} ids; was it made with another tokenizer?"
                )
            needed = len(prompt.tokens) + self.config.max_response_length
            limit = self.hf.max_position_embeddings
            if needed > limit:
                raise DataError(
                    f"prompt {prompt.id!r} has {len(prompt.tokens)} tokens; with --max-response-length "
                    f"{self.config.max_response_length} that is more than the {limit} positions of "
                    f"{self.hf.path}; lower that or --max-prompt-length"
                )

    def rollout(
        self,
        prompt: Prompt,
        sample_index: int,
        *,
        tokens: list[int],
        logprobs: list[float],
        hidden_TH: torch.Tensor | None = None,
        policy_iteration: int | None = None,
    ) -> Rollout:
        """The record of a response.

        Args:
            sample_index: in the global batch.
            policy_iteration: as in :class:`Rollout`.
        """
        samples = self.config.num_samples_per_prompt
        return Rollout(
            id=prompt.id if samples == 1 else f"{prompt.id}/{sample_index % samples}",
            prompt_tokens=prompt.tokens,
            response_tokens=tokens,
            response_logprobs=logprobs,
            finish_reason="stop" if tokens[-1] in self.hf.eos_token_ids else "length",
            prompt=prompt.prompt,
            messages=prompt.messages,
            response=None if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True),
            extra=prompt.extra,
            hidden_TH=hidden_TH,
            policy_iteration=policy_iteration,
        )
