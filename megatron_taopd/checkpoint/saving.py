"""Writing a checkpoint: aside first, published by rename, the tracker file last."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_taopd.checkpoint import layout, model_state, optimizer_state
from megatron_taopd.checkpoint.collective import on_rank_zero, raise_together
from megatron_taopd.checkpoint.random_state import current_layout, save_random_state


def save_checkpoint(
    directory: str | Path,
    *,
    iteration: int,
    module: torch.nn.Module | Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    extra_state: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    hf_source: str | Path | None = None,
) -> Path:
    """Write ``directory/iter_…`` and make it the newest checkpoint. Collective.

    A script that calls this needs the ``if __name__ == "__main__":`` guard: megatron-core's writer starts a
    process.

    Args:
        module: this rank's model chunks, wrapped in DDP or not.
        extra_state: plain values (numbers, strings, lists, dicts, tensors), the same on every rank.
        config: saved as JSON beside the weights.
        hf_source: Hugging Face directory whose config, tokenizer and generation config are kept.

    Returns:
        The directory of this iteration.

    Raises:
        CheckpointError: a file cannot be written, on every rank.
    """
    directory = Path(directory)
    final = directory / layout.iteration_name(iteration)
    aside = directory / f".{final.name}.partial"
    _check_plain(extra_state or {})

    def prepare() -> None:
        for leftover in directory.glob(".iter_*.partial"):
            shutil.rmtree(leftover)
        aside.mkdir(parents=True)

    def publish() -> None:
        if config is not None:
            (aside / layout.RUN_CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n")
        if hf_source is not None:
            layout.copy_hf_files(hf_source, aside / layout.HF_FILES)
        replaced = directory / f".{final.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            os.rename(final, replaced)
        os.rename(aside, final)
        layout.write_latest_iteration(directory, iteration)
        shutil.rmtree(replaced, ignore_errors=True)

    on_rank_zero(prepare)
    chunks = model_state.unwrap(module)
    state: dict[str, Any] = model_state.sharded_state(chunks)
    if optimizer is not None:
        state["optimizer"] = optimizer_state.sharded_state(optimizer, state, is_loading=False)
    if scheduler is not None:
        state["opt_param_scheduler"] = scheduler.state_dict()
    state["checkpoint_version"] = 3.0
    state["iteration"] = iteration
    state["taopd"] = {
        "extra_state": extra_state or {},
        "layout": current_layout(),
        "optimizer": None if optimizer is None else optimizer_state.describe(optimizer),
        "real_vocab_size": model_state.real_vocab_size(chunks),
    }
    dist_checkpointing.save(state, str(aside), content_metadata=dict(optimizer_state.METADATA))
    raise_together(_try_to_save_random_state(aside))
    on_rank_zero(publish)
    return final


def _try_to_save_random_state(path: Path) -> str | None:
    try:
        (path / layout.RANDOM_STATES).mkdir(exist_ok=True)
        save_random_state(path)
    except OSError as error:
        return f"cannot write the checkpoint: {error}"
    return None


def _check_plain(extra_state: dict[str, Any]) -> None:
    """Fail while nothing is written yet if these values could not be read back safely."""
    buffer = io.BytesIO()
    torch.save(extra_state, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
