"""Megatron's GPTModel, ending in final hidden states instead of logits.

S sequence, B batch, H hidden size, V padded vocabulary, TP tensor-parallel size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_taopd.models.hf_config import HFModelConfig
from megatron_taopd.models.layers import decoder_spec
from megatron_taopd.models.sample_cache import SampleCache


class DistillationGPTModel(GPTModel):
    """A causal language model whose last stage answers final hidden states; losses apply the head themselves.

    Outside inference ``forward(input_ids, position_ids, attention_mask)`` returns [S, B, H] after the final
    norm ([S/TP, B, H] under sequence parallelism) and never makes logits. With a :class:`SampleCache` it is the
    last token's alone, [1, B, H]. In Megatron's own inference engine (another ``inference_context`` and eval mode) it
    returns logits [B, S, V] whose ids past the real vocabulary are -inf, so that padding is never sampled.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hf: HFModelConfig,
        *,
        padded_vocab_size: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        head: bool = True,
    ) -> None:
        """Build it.

        Args:
            head: False leaves out the LM head, which then is elsewhere.
        """
        super().__init__(
            config,
            transformer_layer_spec=decoder_spec(config, vp_stage=vp_stage),
            vocab_size=padded_vocab_size,
            max_sequence_length=hf.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=hf.tied and head,
            position_embedding_type="rope",
            rotary_base=hf.rope_theta,
            vp_stage=vp_stage,
        )
        if post_process and not head:  # the decoder keeps its final norm
            self.post_process = False
            del self.output_layer
        self.real_vocab_size = hf.vocab_size
        if hf.rope_scaling is not None:
            self.rotary_pos_emb.inv_freq = scale_frequencies(self.rotary_pos_emb.inv_freq, hf.rope_scaling)

    def head_weight(self) -> Tensor:
        """This rank's shard [V/TP, H] of the LM head, tied or not; on the last pipeline stage only."""
        if not self.post_process:
            raise RuntimeError("only the last pipeline stage has an LM head, and only of a model built with it")
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        context = kwargs.get("inference_context")
        if context is None or self.training:
            return hidden_states
        if isinstance(context, SampleCache):
            return hidden_states[-1:]
        logits = super()._postprocess(hidden_states, *args, **kwargs)
        logits[..., self.real_vocab_size :] = -math.inf
        return logits


def scale_frequencies(inv_freq: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Rotary frequencies stretched for longer contexts, as transformers' ``modeling_rope_utils`` does.

    Args:
        inv_freq: [D/2], radians a position.
        scaling: ``rope_type`` linear or llama3 and its parameters.
    """
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return inv_freq / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wave_length = 2 * math.pi / inv_freq
    smooth = (context / wave_length - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wave_length > context / low, inv_freq / factor, inv_freq)
    medium = (wave_length <= context / low) & (wave_length >= context / high)
    return torch.where(medium, blended, scaled)
