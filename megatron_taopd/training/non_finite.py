"""Losses and gradients that are not finite: found before the optimizer steps, written down, and then?

Megatron's own check raises on the rank that meets one while the others wait in a collective. Here every rank looks at
its loss, and at its gradients before they are summed over the replicas, and all ranks hear of it together.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from safetensors.torch import save_file

from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.data.records import Rollout, write_rollouts
from megatron_taopd.platform import device, distributed
from megatron_taopd.training.scopes import Outcome

logger = logging.getLogger(__name__)

LARGEST_NORM = 1e12
"""Of a rank's gradient. One above would not stay finite when it is squared and summed over many ranks."""
NAMED = 5


@dataclass(kw_only=True)
class Finding:
    """What is not finite on a rank."""

    rank: int
    losses: list[str]
    """Responses of the micro-batches whose loss is not finite."""
    gradients: list[str]
    """Parameters."""
    rows: dict[str, int]
    """Statistic -> response positions where it is not finite."""

    def __str__(self) -> str:
        parts = []
        if self.losses:
            parts.append(f"the loss of {_some(self.losses)}")
        if self.gradients:
            parts.append(f"the gradient of {_some(self.gradients)}")
        if self.rows:
            parts.append("statistics of some positions (" + ", ".join(f"{k}: {n}" for k, n in self.rows.items()) + ")")
        return f"rank {self.rank}: {'; '.join(parts)}"


class FiniteCheck:
    """Looks at every step of a run.

    Megatron's schedule calls :meth:`finalize_grads` after the last backward, ahead of the sums over the replicas.
    """

    def __init__(self, student: Sequence[DistributedDataParallel]) -> None:
        self.student = student
        self.bad_gradients: list[str] = []

    def finalize_grads(self, *args: Any, **kwargs: Any) -> Any:
        """Check this rank's gradients, then do what Megatron does there."""
        self.bad_gradients = self._bad_gradients()
        return finalize_model_grads(*args, **kwargs)

    def passes(self, reports: Sequence[dict[str, torch.Tensor]]) -> bool:
        """Whether loss and gradients are finite on all ranks. Collective."""
        bad = torch.tensor(int(bool(self.bad_gradients or bad_losses(reports))), device=device())
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        return not bad

    def findings(
        self, reports: Sequence[dict[str, torch.Tensor]], outcome: Outcome, batch: Sequence[MicroBatch], names: NamesOf
    ) -> list[Finding]:
        """What each rank found, where it found something. Collective.

        Args:
            names: of responses, from their indices in the global batch.
        """
        indices = sorted({int(i) for place in bad_losses(reports) for i in batch[place].sample_index_R.tolist()})
        own = Finding(
            rank=distributed.rank(), losses=names(indices), gradients=self.bad_gradients, rows=_bad_rows(outcome)
        )
        ranks: list[Finding] = [own] * distributed.world_size()
        dist.all_gather_object(ranks, own)
        return [finding for finding in ranks if finding.losses or finding.gradients or finding.rows]

    def _bad_gradients(self) -> list[str]:
        norms = [
            buffer.grad_data.norm(dtype=torch.float32)
            for chunk in self.student
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]
        if not norms or bool((torch.stack(norms) <= LARGEST_NORM).all()):
            return []
        parameters = [(name, p.main_grad) for chunk in self.student for name, p in chunk.module.named_parameters()]
        bad = [name for name, gradient in parameters if not bool(gradient.norm() <= LARGEST_NORM)]
        return bad or ["all parameters together"]


NamesOf = Callable[[Sequence[int]], list[str]]


def bad_losses(reports: Sequence[dict[str, torch.Tensor]]) -> list[int]:
    """Micro-batches whose loss is not finite."""
    return [i for i, report in enumerate(reports) if not bool(torch.isfinite(report["loss_sum"]).all())]


def _bad_rows(outcome: Outcome) -> dict[str, int]:
    if outcome.scored is None:
        return {}
    statistics = outcome.scored.statistics
    counts = {f.name: int((~torch.isfinite(getattr(statistics, f.name))).sum()) for f in fields(statistics)}
    return {name: count for name, count in counts.items() if count}


def write_down(
    directory: Path, iteration: int, *, findings: Sequence[Finding], outcome: Outcome, rollouts: Sequence[Rollout]
) -> str:
    """Write the batch of a step; returns what to say of it. Collective; a disk that is full is said, not raised.

    ``rollouts_REPLICA.jsonl`` is read by ``--rollout-data``; ``rows_RANK.safetensors`` has a row a response position:
    ids, places, whether it is kept, and every statistic; ``report.json`` is what the message says.
    """
    problem = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        is_first_of_replica = not any((distributed.tensor_parallel_rank(), distributed.context_parallel_rank()))
        if is_first_of_replica and distributed.is_last_stage():
            write_rollouts(directory / f"rollouts_{distributed.data_parallel_rank():05d}.jsonl", rollouts)
        scored, selection = outcome.scored, outcome.selection
        if scored is not None and selection is not None and distributed.tensor_parallel_rank() == 0:
            columns = {f.name: getattr(scored.statistics, f.name) for f in fields(scored.statistics)}
            columns |= {"token_id": scored.token_ids_R, "sample_index": scored.sample_index_R}
            columns |= {"position": scored.position_R, "keep": selection.keep, "score": selection.score}
            tensors = {name: column.cpu().contiguous() for name, column in columns.items()}
            save_file(tensors, directory / f"rows_{distributed.rank():05d}.safetensors")
        if distributed.rank() == 0:
            report = {"iteration": iteration, "ranks": [asdict(finding) for finding in findings]}
            (directory / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except Exception as error:  # whatever a full disk makes safetensors raise
        problem = f"rank {distributed.rank()}: {error}"
    problems: list[str | None] = [problem] * distributed.world_size()
    dist.all_gather_object(problems, problem)
    first = next(filter(None, problems), None)
    return (
        f"the batch is in {directory}" if first is None else f"the batch could not be written to {directory}: {first}"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
