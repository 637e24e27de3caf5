"""Tests of megatron_taopd.platform."""

from megatron_taopd import platform

platform.enable()
