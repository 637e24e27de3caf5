"""Megatron's text generation loop with our sampling, stopping and communication.

``StaticInferenceEngine`` is a queue in front of this loop that reseeds torch's global generator, keeps every
request it has answered and draws a progress bar; so the loop is driven directly. B samples of a batch.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.inference_request import InferenceRequest
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import (
    TextGenerationController,
)

from megatron_taopd.models import DistillationGPTModel
from megatron_taopd.platform import device, distributed
from megatron_taopd.rollout.sampling import choose_tokens, sampling_numbers


class ModelWrapper(GPTInferenceWrapper):
    """Runs the model outside inference mode, because some of its tensors live on in Megatron's caches.

    Rotary embeddings do, and a fused kernel saves them for its backward, which inference tensors refuse.
    """

    def _forward(self, inference_input: dict[str, Any]) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return super()._forward(inference_input)

    def run_one_forward_step(self, inference_input: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits [B, 1, vocabulary] on the last pipeline stage; a stand-in [B, 1, 1] on the others."""
        logits = super().run_one_forward_step(inference_input, *args, **kwargs)
        if logits is None:
            return torch.zeros(inference_input["tokens"].shape[0], 1, 1, device=device())
        return logits


class RolloutController(TextGenerationController):
    """Generates one static batch, then is thrown away with its cache of keys and values.

    One rank samples and tells the ranks of its replica: two numbers a sample travel, where Megatron would
    send the logits from the last stage to the others, and no two ranks can disagree about a token.
    """

    def __init__(
        self,
        model: DistillationGPTModel,
        prompts: Sequence[list[int]],
        *,
        sample_index: Sequence[int],
        stop_tokens: Sequence[int],
        max_response_length: int,
        vocab_size: int,
        temperature: float,
        top_p: float | None,
        seed: int,
        step: int,
    ) -> None:
        longest = max(map(len, prompts))
        context = StaticInferenceContext(len(prompts), longest + max_response_length)
        # Of a tokenizer Megatron asks for a padding id alone, which it calls the end of document.
        super().__init__(wrap_model(model, context), SimpleNamespace(eod=0))
        self.model_is_pipeline_parallel = False  # tokens are sent round below, not logits
        self.prompts = prompts
        self.max_response_length = max_response_length
        self.vocab_size = vocab_size
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed
        self.step = step
        self.stop_tokens = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device())
        self.sample_index_B = torch.tensor(list(sample_index), dtype=torch.int64, device=device())
        self.prompt_lengths_B = torch.tensor(list(map(len, prompts)), dtype=torch.int64, device=device())
        self.logprobs = torch.zeros(len(prompts), max_response_length, dtype=torch.float64, device=device())
        self.next_index = min(map(len, prompts))

    def run(self) -> list[tuple[list[int], list[float]]]:
        """Response tokens, the stop token included, and their log-probabilities, prompt by prompt."""
        params = SamplingParams(num_tokens_to_generate=self.max_response_length)
        requests = OrderedDict(
            (i, InferenceRequest(request_id=i, prompt="", prompt_tokens=prompt, sampling_params=params))
            for i, prompt in enumerate(self.prompts)
        )
        answers = []
        logprobs = self.logprobs
        for i, request in self.generate_all_output_tokens_static_batch(requests).items():
            tokens = request.generated_tokens.tolist()
            answers.append((tokens, logprobs[i, : len(tokens)].tolist()))
        return answers

    def sample_from_logits(self, last_token_logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The next token of every sample [B]; Megatron drops those of samples still in their prompt."""
        position_B = self.next_index - self.prompt_lengths_B
        self.next_index += 1
        group = distributed.model_parallel_group()
        sampler = torch.distributed.get_process_group_ranks(group)[-distributed.tensor_parallel_size()]
        drawn_2B = torch.empty(2, position_B.numel(), dtype=torch.float64, device=position_B.device)
        if distributed.rank() == sampler:
            tokens_B, logprobs_B = choose_tokens(
                last_token_logits,
                sampling_numbers(self.seed, self.step, self.sample_index_B, position_B),
                vocab_size=self.vocab_size,
                temperature=self.temperature,
                top_p=self.top_p,
            )
            drawn_2B = torch.stack([tokens_B.double(), logprobs_B.double()])
        if group.size() > 1:
            torch.distributed.broadcast(drawn_2B, sampler, group=group)
        answered = (position_B >= 0) & (position_B < self.max_response_length)
        self.logprobs[answered, position_B[answered]] = drawn_2B[1, answered]
        return drawn_2B[0].long()

    def update_generation_status(
        self,
        updated_prompts_tokens: torch.Tensor,
        generation_started: torch.Tensor,
        current_context_end_position: int,
        is_generation_done_tensor: torch.Tensor,
        generated_sequence_lengths: torch.Tensor,
        termination_id: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Several stop tokens, each counted as part of the response; a sample at the limit is done too."""
        active = generation_started & ~is_generation_done_tensor
        lengths = generated_sequence_lengths + active
        stopped = torch.isin(updated_prompts_tokens[:, current_context_end_position], self.stop_tokens)
        finished = active & (stopped | (lengths >= self.max_response_length))
        return is_generation_done_tensor | finished, lengths.int()

    def detokenize_generations(self, *args: Any, **kwargs: Any) -> tuple[str, None]:
        """Text is made elsewhere, of the response alone."""
        return "", None


def wrap_model(model: DistillationGPTModel, context: StaticInferenceContext) -> ModelWrapper:
    """Megatron's inference wrapper; until 0.16 it asks for a configuration, later it reads the model's."""
    module = "megatron.core.inference.model_inference_wrappers.inference_wrapper_config"
    try:
        wrapper_config = importlib.import_module(module).InferenceWrapperConfig
    except ModuleNotFoundError:
        return ModelWrapper(model, context)
    config = wrapper_config(
        hidden_size=model.config.hidden_size,
        params_dtype=model.config.params_dtype,
        fp32_residual_connection=model.config.fp32_residual_connection,
        inference_batch_times_seqlen_threshold=-1,  # the whole batch goes through the pipeline at once
        padded_vocab_size=model.vocab_size,
        inference_max_requests=context.max_batch_size,
        inference_max_seq_length=context.max_sequence_length,
    )
    return ModelWrapper(model, config, context)
