"""Teachers: frozen models that read the responses, at the student's layout or at one of their own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.models import LoadedModel
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.training.exchange import Job, Routes, as_micro_batches, deal, gather_jobs
from megatron_taopd.training.forward import forward_hidden, pick_rows
from megatron_taopd.training.offload import HeldRows, OffloadedWeights

_ROUND = 8


@dataclass(kw_only=True)
class Teacher:
    """One teacher of this rank."""

    name: str | None
    """As in ``--teacher NAME=PATH``."""
    model: LoadedModel
    """At the student's layout with its LM head, at a layout of its own without."""
    head_weight: torch.Tensor | None
    """[padded vocabulary / TP, H], cut like the student's; None off the student's last stage."""
    routes: Routes | None = None
    """To and from a layout of its own; None: it has the student's."""
    offloaded: OffloadedWeights | None = None
    """The weights but for the LM head, where they live in host memory."""

    def on_device(self) -> AbstractContextManager[None]:
        """The block in which the model may run a forward pass. The LM head can be used outside, too."""
        return nullcontext() if self.offloaded is None else self.offloaded.on_device()

    def read(self, micro_batches: Sequence[MicroBatch], *, on_host: bool = False) -> list[HeldRows]:
        """Final hidden states of each micro-batch's response rows; an empty list off the student's last stage.

        All ranks call it.

        Args:
            on_host: they wait in host memory.
        """
        if self.routes is not None:
            return self._read_elsewhere(self.routes, micro_batches, on_host=on_host)

        def hold(micro_batch: MicroBatch, hidden_SBH: torch.Tensor) -> HeldRows:
            return HeldRows(self._pick(micro_batch, hidden_SBH), on_host=on_host)

        if not micro_batches:
            return []
        with self.on_device():
            return forward_hidden(self.model.modules, micro_batches, hold)

    def _pick(self, micro_batch: MicroBatch, hidden_SBH: torch.Tensor) -> torch.Tensor:
        return pick_rows(hidden_SBH, micro_batch.row_index_R, self.model.config)

    def _read_elsewhere(self, routes: Routes, micro_batches: Sequence[MicroBatch], *, on_host: bool) -> list[HeldRows]:
        """The same at the teacher's layout: its replicas share the micro-batches of all the student's replicas."""
        layout, config = routes.layout, self.model.config
        jobs = gather_jobs(micro_batches)
        shares = deal(len(jobs), routes.readers)
        most = max(len(share) for share in shares)
        # Rows that are to wait in host memory leave the device round by round.
        size = max(_ROUND, 2 * layout.config.pipeline_model_parallel_size) if on_host else max(most, 1)
        received: dict[int, HeldRows] = {}
        with self.on_device():
            for start in range(0, most, size):
                parts = [share[start : start + size] for share in shares]
                with layout.in_force():
                    rows = self._read_jobs(layout.config, jobs, parts[routes.mine.reader], most=max(map(len, parts)))
                numbered = {number: (jobs[number], reader) for reader, part in enumerate(parts) for number in part}
                arrived = routes.deliver(numbered, rows, hidden_size=config.hidden_size, dtype=config.params_dtype)
                received |= {number: HeldRows(tensor, on_host=on_host) for number, tensor in arrived.items()}
        return [received[number] for number in sorted(received)]

    def _read_jobs(
        self, parallel: ParallelConfig, jobs: Sequence[Job], numbers: Sequence[int], *, most: int
    ) -> dict[int, torch.Tensor]:
        """Rows [R, H] of some jobs, by number, in the teacher's layout; empty off its last stage."""
        batches = as_micro_batches(
            [jobs[number] for number in numbers],
            length_multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
            at_least=most if self.model.hf.experts is not None and parallel.shares_experts else 0,
        )
        rows = forward_hidden(self.model.modules, batches, self._pick) if batches else []
        return dict(zip(numbers, rows, strict=False))
