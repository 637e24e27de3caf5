"""Models: HF configuration, Megatron layer specs, the GPT model that ends in hidden states, loading."""

from megatron_taopd import platform

if not platform.has_cuda():  # Before the modules below import Megatron.
    platform.enable()

from megatron_taopd.models.build import LoadedModel, build_model, load_head, load_model, pad_vocab_size
from megatron_taopd.models.fp8 import fp8_fields
from megatron_taopd.models.gpt import DistillationGPTModel
from megatron_taopd.models.hf_config import HFModelConfig, load_hf_config
from megatron_taopd.models.source import hf_directory, is_megatron_checkpoint
from megatron_taopd.models.transformer_config import (
    build_transformer_config,
    check_layout,
    have_transformer_engine,
    refuse_expert_layout_in_vain,
    use_transformer_engine,
)

__all__ = [
    "DistillationGPTModel",
    "HFModelConfig",
    "LoadedModel",
    "build_model",
    "build_transformer_config",
    "check_layout",
    "fp8_fields",
    "have_transformer_engine",
    "hf_directory",
    "is_megatron_checkpoint",
    "load_head",
    "load_hf_config",
    "load_model",
    "pad_vocab_size",
    "refuse_expert_layout_in_vain",
    "use_transformer_engine",
]
