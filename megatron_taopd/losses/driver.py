"""The loss of all kept rows, chunk by chunk, from hidden states and both LM heads.

Shapes: R rows, H hidden size, V ids of this rank. A chunk's logits live only as long as its own loss and
gradient: the gradients of hidden states [R, H] and head are made in the forward pass, so that no logits wait
for the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from megatron_taopd.errors import ConfigError
from megatron_taopd.losses.config import LossConfig
from megatron_taopd.losses.functions import LOSSES, Loss, LossInputs
from megatron_taopd.ops.head import DEFAULT_LOGITS_CHUNK_BYTES, HeadShard
from megatron_taopd.ops.vocab import check_support_size
from megatron_taopd.registry import resolve


class _Job(NamedTuple):
    """What does not take part in autograd."""

    teacher_hidden_RH: torch.Tensor
    token_ids_R: torch.Tensor
    old_logprobs_R: torch.Tensor
    weights_R: torch.Tensor | None
    student_head: HeadShard
    teacher_head: HeadShard
    loss: Loss
    config: LossConfig
    k: int
    temperature: float
    logits_chunk_bytes: int
    with_grad: bool


def distillation_loss(
    student_hidden_RH: torch.Tensor,
    teacher_hidden_RH: torch.Tensor,
    token_ids_R: torch.Tensor,
    old_logprobs_R: torch.Tensor,
    student_head: HeadShard,
    teacher_head: HeadShard,
    *,
    config: LossConfig,
    k: int = 16,
    temperature: float = 1.0,
    weights_R: torch.Tensor | None = None,
    logits_chunk_bytes: int = DEFAULT_LOGITS_CHUNK_BYTES,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses of all rows (nats; not divided by anything). All ranks of the heads' group call it.

    Args:
        student_hidden_RH: final hidden states of the kept rows, the same on every rank, from
            ``ops.gather_rows`` (the gradient that this sends back is partial over the vocabulary shards, and
            gather_rows sums it).
        teacher_hidden_RH: the teacher's; detached.
        token_ids_R: int64 sampled tokens.
        old_logprobs_R: log p_s(y) of the policy that sampled them, at the same temperature; used by
            ``sampled_reverse_kl`` alone.
        student_head: this rank's shard; its ``weight`` gets its gradient where it asks for one.
        teacher_head: the same ids of the teacher.
        config: which loss, and its knobs.
        k: size of the supports of the top-K losses.
        temperature: divides the logits of both models.
        weights_R: detached factor a row (default: 1).
        logits_chunk_bytes: memory for one chunk of one model's fp32 logits; about six such buffers exist at
            once.

    Returns:
        The scalar sum, replicated over the group, fp32 (fp64 for fp64 weights); with no rows a zero that
        still depends on hidden states and head. And what the loss reports, as detached sums over rows of
        weight not 0.

    Raises:
        ConfigError: K is larger than the vocabulary, or the temperature is not positive.
    """
    student_head.check_lines_up_with(teacher_head)
    if not temperature > 0:
        raise ConfigError(f"temperature {temperature} must be positive: logits are divided by it")
    if config.loss.startswith("topk_"):
        check_support_size(k, student_head.vocab_size)
    weight = student_head.weight
    job = _Job(
        teacher_hidden_RH=teacher_hidden_RH.detach(),
        token_ids_R=token_ids_R,
        old_logprobs_R=old_logprobs_R.detach(),
        weights_R=None if weights_R is None else weights_R.detach(),
        student_head=student_head,
        teacher_head=teacher_head,
        loss=resolve("loss", config.loss, LOSSES),
        config=config,
        k=k,
        temperature=temperature,
        logits_chunk_bytes=logits_chunk_bytes,
        with_grad=torch.is_grad_enabled() and (student_hidden_RH.requires_grad or weight.requires_grad),
    )
    metrics: dict[str, torch.Tensor] = {}
    return _ChunkedLoss.apply(student_hidden_RH, weight, job, metrics), metrics


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RH: torch.Tensor, weight: torch.Tensor, job: _Job, metrics: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        head = job.student_head
        wants_hidden, wants_weight = (job.with_grad and need for need in ctx.needs_input_grad[:2])
        accumulate = torch.float64 if weight.dtype == torch.float64 else torch.float32
        grad_hidden = torch.empty_like(hidden_RH) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if wants_weight else None
        total = torch.zeros((), dtype=accumulate, device=weight.device)
        for rows in head.chunks(hidden_RH.shape[0], job.logits_chunk_bytes):
            logits_RV = head.logits(hidden_RH[rows])
            with torch.enable_grad() if job.with_grad else torch.no_grad():
                logits_RV.requires_grad_(job.with_grad)
                loss_sum = _chunk_loss(logits_RV, rows, job, metrics)
            total += loss_sum.detach()
            if not job.with_grad:
                continue
            (grad_logits_RV,) = torch.autograd.grad(loss_sum, logits_RV)
            if grad_hidden is not None:
                grad_hidden[rows] = head.hidden_gradient(grad_logits_RV)
            if grad_weight is not None:
                head.add_weight_gradient(grad_weight, grad_logits_RV, hidden_RH[rows])
        ctx.grads = (grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        if ctx.grads is None:
            raise RuntimeError("distillation_loss can be differentiated once: its gradients are scaled in place")
        grad_hidden, grad_weight = (None if g is None else g.mul_(grads[0]) for g in ctx.grads)
        ctx.grads = None
        return grad_hidden, grad_weight, None, None


def _chunk_loss(
    student_logits_RV: torch.Tensor, rows: slice, job: _Job, metrics: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Weighted sum over a chunk's rows; adds to the metrics."""
    config = job.config
    dtype = student_logits_RV.dtype
    loss_R, metrics_R = job.loss(
        LossInputs(
            student_logits_RV=student_logits_RV / job.temperature,
            teacher_logits_RV=job.teacher_head.logits(job.teacher_hidden_RH[rows], job.temperature),
            token_ids_R=job.token_ids_R[rows],
            old_logprobs_R=job.old_logprobs_R[rows].to(dtype),
            vocab_start=job.student_head.vocab_start,
            vocab_size=job.student_head.vocab_size,
            group=job.student_head.group,
            k=job.k,
            support=config.loss_support or "student",
            jsd_beta=0.5 if config.jsd_beta is None else config.jsd_beta,
            ratio_clip=config.loss_ratio_clip,
        )
    )
    if job.weights_R is not None:
        # A row of weight 0 leaves the sum whatever its loss is, even where that is not finite.
        weights_R = job.weights_R[rows].to(dtype)
        loss_R = (loss_R * weights_R).where(weights_R != 0, 0.0)
        metrics_R = {name: value.where(weights_R != 0, 0) for name, value in metrics_R.items()}
    for name, value in metrics_R.items():
        metrics[name] = metrics.get(name, 0.0) + value.to(dtype).sum()
    return loss_R.sum()
