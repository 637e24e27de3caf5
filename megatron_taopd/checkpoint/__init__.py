"""Megatron checkpoints: ``DIR/latest_checkpointed_iteration.txt`` and ``DIR/iter_0000010/`` (torch_dist).

A checkpoint holds weights, optimizer, schedule, random states and counts in megatron-core's distributed
format, which loads at any tensor- and pipeline-parallel size, plus the ``hf/`` files (config, tokenizer) that
make it usable as a model directory.
"""

from megatron_taopd import platform

if not platform.has_cuda():  # Before the modules below import Megatron.
    platform.enable()

from megatron_taopd.checkpoint.layout import (
    hf_files_dir,
    is_megatron_checkpoint,
    read_latest_iteration,
    read_saved_config,
)
from megatron_taopd.checkpoint.loading import LoadedState, load_checkpoint, load_head_weight, load_model_weights
from megatron_taopd.checkpoint.newest import load_newest_checkpoint
from megatron_taopd.checkpoint.saving import PendingSave, begin_saving, save_checkpoint

__all__ = [
    "LoadedState",
    "PendingSave",
    "begin_saving",
    "hf_files_dir",
    "is_megatron_checkpoint",
    "load_checkpoint",
    "load_head_weight",
    "load_model_weights",
    "load_newest_checkpoint",
    "read_latest_iteration",
    "read_saved_config",
    "save_checkpoint",
]
