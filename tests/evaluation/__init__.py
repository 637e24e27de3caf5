"""Tests of megatron_taopd.evaluation."""

from megatron_taopd import platform

platform.enable()
