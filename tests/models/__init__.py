"""Tests of megatron_taopd.models."""

from megatron_taopd import platform

platform.enable()
