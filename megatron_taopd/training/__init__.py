"""The loop: rollout, score, select, train, step."""

from megatron_taopd import platform

platform.enable()
