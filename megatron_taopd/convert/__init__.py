"""HF directories to Megatron modules and back, one mapping table a family."""

from megatron_taopd import platform

if not platform.has_cuda():  # Before the modules below import Megatron.
    platform.enable()

from megatron_taopd.convert.export import export_hf
from megatron_taopd.convert.load import load_hf_weights

__all__ = ["export_hf", "load_hf_weights"]
