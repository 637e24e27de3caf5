"""Writing a checkpoint: aside first, with checksums, published by rename, the tracker file last."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_taopd.checkpoint import checksums, layout, model_state, optimizer_state, publishing, writing
from megatron_taopd.checkpoint.collective import on_rank_zero
from megatron_taopd.checkpoint.random_state import current_layout, random_state_name, save_random_state
from megatron_taopd.errors import CheckpointError
from megatron_taopd.files import sha256_of_file
from megatron_taopd.platform import device, progress
from megatron_taopd.platform.together import raise_together


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
    keep_last: int | None = None,
) -> Path:
    """Write ``directory/iter_…`` and make it the newest checkpoint. Collective.

    Args:
        module: this rank's model chunks, wrapped in DDP or not.
        extra_state: plain values (numbers, strings, lists, dicts, tensors), the same on every rank.
        config: saved as JSON beside the weights.
        hf_source: Hugging Face directory whose config, tokenizer and generation config are kept.
        keep_last: delete older checkpoints beyond this many.

    Returns:
        The directory of this iteration.

    Raises:
        CheckpointError: a file cannot be written, on every rank; older checkpoints are untouched.
    """
    return begin_saving(
        directory,
        iteration=iteration,
        module=module,
        optimizer=optimizer,
        scheduler=scheduler,
        extra_state=extra_state,
        config=config,
        hf_source=hf_source,
        keep_last=keep_last,
    ).finish()


def begin_saving(
    directory: str | Path,
    *,
    iteration: int,
    module: torch.nn.Module | Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    extra_state: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    hf_source: str | Path | None = None,
    keep_last: int | None = None,
    in_background: bool = False,
) -> PendingSave:
    """The state as it is now, on its way to ``directory/iter_…``; see :func:`save_checkpoint`. Collective.

    Args:
        in_background: a process writes while training goes on. It holds this rank's state in host memory once more.

    Returns:
        What publishes the checkpoint; there must not be two at once.

    Raises:
        CheckpointError: as :func:`save_checkpoint`.
    """
    directory = Path(directory)
    _check_plain(extra_state or {})
    pending = PendingSave(directory, iteration, config=config, hf_source=hf_source, keep_last=keep_last)
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
        "has_checksums": True,
        "real_vocab_size": model_state.real_vocab_size(chunks),
    }
    pending.start(state, in_background=in_background)
    return pending


class PendingSave:
    """A checkpoint that is being written aside."""

    def __init__(
        self,
        directory: Path,
        iteration: int,
        *,
        config: dict[str, Any] | None,
        hf_source: str | Path | None,
        keep_last: int | None,
    ) -> None:
        self.directory = directory
        self.iteration = iteration
        self.config = config
        self.hf_source = hf_source
        self.keep_last = keep_last
        self.name = layout.iteration_name(iteration)
        self._aside: Path | None = None
        self._plan: writing.Plan | None = None
        self._writer: writing.WriterProcess | None = None
        self._written = writing.Written()

    def start(self, state: dict[str, Any], *, in_background: bool) -> None:
        """Write a sharded state. Collective."""
        try:
            self._aside = on_rank_zero(lambda: publishing.make_aside(self.directory, self.iteration))
        except CheckpointError as error:
            raise self._failure(str(error)) from None
        self._plan = writing.plan(state, self._aside, dict(optimizer_state.METADATA))
        progress.beat()
        self._agree(self._plan.error or self._try_to_save_random_state())
        if in_background:
            self._writer = writing.WriterProcess(self._plan.buckets, self._plan.transforms)
        else:
            written = writing.write(self._plan.buckets, self._plan.transforms)
            self._written = written.joined(self._written)

    def done(self) -> bool:
        """Whether all ranks have written, so that :meth:`finish` does not wait. Collective."""
        written = self._writer is None or self._writer.done()
        ranks = torch.tensor(int(written), device=device())
        dist.all_reduce(ranks, op=dist.ReduceOp.MIN)
        return bool(ranks)

    def finish(self) -> Path:
        """Wait for all ranks' files, then publish. Collective.

        Raises:
            CheckpointError: as :func:`save_checkpoint`.
        """
        assert self._plan is not None, "start() comes first"
        if self._writer is not None:
            self._written, self._writer = self._writer.wait().joined(self._written), None
        progress.beat()
        self._agree(self._written.error)
        digests_of_ranks: list[dict[str, str]] = [{}] * dist.get_world_size()
        dist.all_gather_object(digests_of_ranks, self._written.digests)
        self._agree(self._plan.finish_index(self._written))
        try:
            return on_rank_zero(lambda: self._publish(digests_of_ranks))
        except CheckpointError as error:
            self._remove_aside()
            raise self._failure(str(error)) from None

    def _publish(self, digests_of_ranks: Sequence[dict[str, str]]) -> Path:
        assert self._aside is not None
        aside = self._aside
        save_config(CheckpointingConfig("torch_dist", 1), str(aside))
        digests = {name: digest for digests in digests_of_ranks for name, digest in digests.items()}
        small = [path for path in aside.iterdir() if path.is_file() and path.name not in digests]
        digests.update({path.name: sha256_of_file(path) for path in small})
        checksums.write_sums(aside, digests)
        # What people may edit has no sum.
        if self.config is not None:
            (aside / layout.RUN_CONFIG).write_text(json.dumps(self.config, indent=2, default=str) + "\n")
        if self.hf_source is not None:
            layout.copy_hf_files(self.hf_source, aside / layout.HF_FILES)
        final = publishing.publish(aside, self.directory, self.iteration)
        if self.keep_last is not None:
            publishing.keep_last(self.directory, self.keep_last, self.iteration)
        return final

    def _try_to_save_random_state(self) -> str | None:
        assert self._aside is not None
        name = random_state_name()
        try:
            (self._aside / name).parent.mkdir(exist_ok=True)
            save_random_state(self._aside)
            self._written.digests[name] = sha256_of_file(self._aside / name)
        except OSError as error:
            return writing.reason(error)
        return None

    def _agree(self, problem: str | None) -> None:
        """End the save on every rank if one has a problem."""
        try:
            raise_together(None if problem is None else f"rank {dist.get_rank()}: {problem}", CheckpointError)
        except CheckpointError as error:
            self._remove_aside()
            raise self._failure(str(error)) from None

    def _remove_aside(self) -> None:
        if dist.get_rank() == 0 and self._aside is not None:
            shutil.rmtree(self._aside, ignore_errors=True)

    def _failure(self, problem: str) -> CheckpointError:
        last_good = on_rank_zero(lambda: publishing.about_last_good(self.directory))
        return CheckpointError(f"cannot write checkpoint {self.directory / self.name}: {problem} ({last_good})")


def _check_plain(extra_state: dict[str, Any]) -> None:
    """Fail while nothing is written yet if these values could not be read back safely."""
    buffer = io.BytesIO()
    torch.save(extra_state, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
