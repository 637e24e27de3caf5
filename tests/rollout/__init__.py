"""Tests of megatron_taopd.rollout."""

from megatron_taopd import platform

platform.enable()
