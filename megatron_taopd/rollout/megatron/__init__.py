"""Responses from the live student through megatron-core's inference."""

from megatron_taopd import platform

if not platform.has_cuda():  # Megatron, which the modules below import, must find the adaptor in place.
    platform.enable()

from megatron_taopd.rollout.megatron.engine import MegatronEngine

__all__ = ["MegatronEngine"]
