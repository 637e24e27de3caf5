"""Tests of megatron_taopd.convert."""

from megatron_taopd import platform

platform.enable()
