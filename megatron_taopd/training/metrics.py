"""The numbers of a step, summed over the last-stage ranks and told to every rank.

Everything is a sum until the end, then divided once by a global count, so that no number depends on the layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_taopd.data.records import Rollout
from megatron_taopd.platform import device, distributed
from megatron_taopd.training.monitor import Monitor
from megatron_taopd.training.scopes import Outcome
from megatron_taopd.training.scoring import ScoredRows

MEAN_STATISTICS = {
    "mean_D": "D",
    "mean_C": "C",
    "mean_C_topk": "C_topk",
    "mean_H": "H",
    "kl_forward": "kl_forward",
    "kl_reverse": "kl_reverse",
    "teacher_entropy": "teacher_entropy",
    "overlap": "overlap",
    "student_mass": "student_mass",
}


def step_metrics(
    *,
    iteration: int,
    rollouts: Sequence[Rollout],
    teachers: Sequence[str],
    outcome: Outcome,
    monitor: Monitor,
    reports: Sequence[dict[str, torch.Tensor]],
    loss_normalization: str,
    learning_rate: float,
    grad_norm: float,
    skipped: bool,
    times: dict[str, float],
) -> dict[str, float]:
    """Metrics of a step (docs/metrics.md has the meaning of each), the same on every rank; all ranks call it.

    Args:
        rollouts: responses of this replica.
        teachers: names of the teachers, where they have some.
        outcome: what was scored and kept on this rank.
        monitor: reads figures of the selection.
        reports: what the loss function reported, a dictionary a micro-batch; empty off the last stage.
        times: seconds of the parts of the step, as this rank saw them; the slowest rank's are reported.
    """
    sums: dict[str, float] = {}
    summary: dict[str, float] = {}
    scored, selection = outcome.scored, outcome.selection
    if scored is not None and selection is not None:
        statistics = scored.statistics
        sums["num_valid_tokens"] = selection.keep.numel()
        sums["num_kept_tokens"] = float(selection.keep.sum())
        for name, field in MEAN_STATISTICS.items():
            sums[name] = float(getattr(statistics, field).double().sum())
        kept_kl = statistics.kl_forward[selection.keep].double().sum()
        sums["kept_kl_forward"] = float(kept_kl)
        sums.update(_by_teacher(scored, selection.keep, teachers))
        counted = rollouts if distributed.context_parallel_rank() == 0 else []  # a replica's ranks have the same
        sums["responses"] = len(counted)
        sums["response_tokens"] = sum(len(r.response_tokens) for r in counted)
        sums["prompt_tokens"] = sum(len(r.prompt_tokens) for r in counted)
        sums["stopped"] = sum(r.finish_reason == "stop" for r in counted)
        for report in reports:
            for name, value in report.items():
                sums[f"loss/{name}"] = sums.get(f"loss/{name}", 0.0) + float(value)
        sums = _sum_over_rows(sums)
        summary = {**selection.summary, **monitor.figures(outcome, iteration=iteration)}
    sums, summary = distributed.tell_from_last_stage((sums, summary))

    valid, kept = sums["num_valid_tokens"], sums["num_kept_tokens"]
    count = kept if loss_normalization == "kept" else valid
    slowest = _maximum(times)
    metrics: dict[str, float] = {
        "iteration": iteration,
        "loss": sums.pop("loss/loss_sum", 0.0) / max(count, 1.0),
        "grad_norm": float(grad_norm),
        "learning_rate": float(learning_rate),
        "num_valid_tokens": valid,
        "num_kept_tokens": kept,
        "keep_ratio": kept / max(valid, 1.0),
        "keep_ratio_asked": outcome.asked.resolved_keep_ratio,
        **outcome.phase,
        **{name: sums[name] / max(valid, 1.0) for name in MEAN_STATISTICS},
        "C_gap": (sums["mean_C"] - sums["mean_C_topk"]) / max(valid, 1.0),
        "kept_kl_forward": sums["kept_kl_forward"] / max(kept, 1.0),
        "response_length": sums["response_tokens"] / max(sums["responses"], 1.0),
        "stop_share": sums["stopped"] / max(sums["responses"], 1.0),
        "student_scoring_forwards": outcome.student_scoring_forwards,
        **slowest,
        "tokens_per_second": (sums["response_tokens"] + sums["prompt_tokens"]) / slowest["time_step"],
        "skipped": float(skipped),
    }
    for name in teachers:
        of_teacher = [sums[f"teacher/{name}/{what}"] for what in ("num_valid_tokens", "num_kept_tokens", "kl_forward")]
        metrics[f"teacher/{name}/num_kept_tokens"] = of_teacher[1]
        metrics[f"teacher/{name}/keep_ratio"] = of_teacher[1] / max(of_teacher[0], 1.0)
        metrics[f"teacher/{name}/kl_forward"] = of_teacher[2] / max(of_teacher[0], 1.0)
    for name, total in sums.items():
        if name.startswith("loss/"):
            metrics[name.removeprefix("loss/")] = total / max(kept, 1.0)
    for name, figure in summary.items():
        metrics.setdefault(name, figure)
    monitor.warn(metrics)
    return metrics


def _by_teacher(scored: ScoredRows, keep_R: torch.Tensor, teachers: Sequence[str]) -> dict[str, float]:
    """This rank's sums over the rows of each teacher."""
    sums: dict[str, float] = {}
    rows = torch.tensor(scored.rows_per_micro_batch, device=keep_R.device)
    teacher_R = torch.tensor(scored.teacher_per_micro_batch, device=keep_R.device).repeat_interleave(rows)
    for index, name in enumerate(teachers):
        own_R = teacher_R == index
        sums[f"teacher/{name}/num_valid_tokens"] = float(own_R.sum())
        sums[f"teacher/{name}/num_kept_tokens"] = float((own_R & keep_R).sum())
        sums[f"teacher/{name}/kl_forward"] = float(scored.statistics.kl_forward[own_R].double().sum())
    return sums


def _sum_over_rows(sums: dict[str, float]) -> dict[str, float]:
    group = distributed.row_group()
    parts: list[dict[str, float]] = [{}] * group.size()
    # A rank that kept nothing has no numbers of the loss to report, so names travel with the values.
    torch.distributed.all_gather_object(parts, sums, group=group)
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _maximum(times: dict[str, float]) -> dict[str, float]:
    values = torch.tensor(list(times.values()), dtype=torch.float64, device=device())
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(times, values.tolist(), strict=True))
