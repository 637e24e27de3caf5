"""Teachability-aware on-policy distillation (TA-OPD, arXiv 2605.26844) on Megatron-Core."""

__version__ = "0.1.0"
