"""Megatron's inference wrapper around the student: one forward of the model through all pipeline stages, virtual ones
too."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.inference.communication_utils import recv_from_prev_pipeline_rank_, send_to_next_pipeline_rank
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper

from megatron_taopd.models import DistillationGPTModel
from megatron_taopd.models.sample_cache import SampleCache
from megatron_taopd.platform import distributed


class ModelWrapper(GPTInferenceWrapper):
    """Runs the model outside inference mode, because some of its tensors live on in Megatron's caches.

    Rotary embeddings do, and a fused kernel saves them for its backward, which inference tensors refuse.
    """

    inference_context: SampleCache
    chunks: Sequence[DistillationGPTModel] = ()
    """The virtual stages, where there are any."""

    def _forward(self, inference_input: dict[str, Any]) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return super()._forward(inference_input)

    def forward_tokens(self, tokens_BL: torch.Tensor, *, first_row: int, slot: int) -> torch.Tensor | None:
        """Read L tokens of some rows; the final hidden state [B, H] of the last ones, None before the last stage."""
        rows, length = tokens_BL.shape
        self.inference_context.begin(first_row=first_row, rows=rows, slot=slot, length=length)
        inference_input = {
            "tokens": tokens_BL,
            "position_ids": None,  # the cache knows them
            "attention_mask": self.inference_context.attention_mask,
        }
        if self.chunks:
            hidden_1BH = self._through_virtual_stages(inference_input, rows, length)
        else:
            hidden_1BH = self.run_one_forward_step(inference_input)
        return None if hidden_1BH is None else hidden_1BH[0]

    def _through_virtual_stages(self, inference_input: dict[str, Any], rows: int, length: int) -> torch.Tensor | None:
        """What Megatron does for one stage, once for each virtual stage: they lie round and round over the ranks."""
        output = None
        for number, chunk in enumerate(self.chunks):
            self.model = chunk
            received = None
            if not distributed.is_first_stage(number):
                received = self._allocate_recv_buffer(rows, length)
                recv_from_prev_pipeline_rank_(received, self.pp_group)
            chunk.set_input_tensor(received)
            output = self._forward(inference_input)
            if not distributed.is_last_stage(number):
                send_to_next_pipeline_rank(output.to(self.pipeline_communication_dtype), self.pp_group)
        self.inference_context.increment_sequence_len_offset(length)
        return output if distributed.is_last_stage() else None


def wrap_model(modules: Sequence[DistillationGPTModel], cache: SampleCache) -> ModelWrapper:
    """Megatron's inference wrapper; until 0.16 it asks for a configuration, later it reads the model's.

    Args:
        modules: this rank's part of the model.
    """
    model = modules[-1]
    module = "megatron.core.inference.model_inference_wrappers.inference_wrapper_config"
    try:
        wrapper_config = importlib.import_module(module).InferenceWrapperConfig
    except ModuleNotFoundError:
        wrapper = ModelWrapper(model, cache)
    else:
        config = wrapper_config(
            hidden_size=model.config.hidden_size,
            params_dtype=model.config.params_dtype,
            fp32_residual_connection=model.config.fp32_residual_connection,
            inference_batch_times_seqlen_threshold=-1,  # the whole batch goes through the pipeline at once
            padded_vocab_size=model.vocab_size,
            inference_max_requests=cache.max_batch_size,
            inference_max_seq_length=cache.max_sequence_length,
        )
        wrapper = ModelWrapper(model, config, cache)
    wrapper.chunks = modules if len(modules) > 1 else ()
    wrapper.prep_model_for_inference()
    return wrapper
