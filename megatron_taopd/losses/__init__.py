"""Distillation losses on kept positions, vocab-parallel, by name."""

from megatron_taopd.losses.config import LossConfig
from megatron_taopd.losses.driver import distillation_loss
from megatron_taopd.losses.functions import LOSSES, LossInputs

__all__ = ["LOSSES", "LossConfig", "LossInputs", "distillation_loss"]
