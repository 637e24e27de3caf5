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
from megatron_taopd.losses.fused import FUSED_LOSSES, Chunk
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
        logits_chunk_bytes: memory for one chunk of one model's fp32 logits; two such buffers exist at once, on GPUs
            three (``jsd`` four); about eight for the ``topk_`` losses and those named by ``module:function``.

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
        dtype = head.logits_dtype
        grad_hidden = torch.empty_like(hidden_RH) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if wants_weight else None
        total = torch.zeros((), dtype=dtype, device=weight.device)
        chunks = list(head.chunks(hidden_RH.shape[0], job.logits_chunk_bytes))
        rows_of_chunk = chunks[0].stop
        student_buffer, teacher_buffer = (
            torch.empty(rows_of_chunk, head.num_valid, dtype=dtype, device=weight.device) for _ in range(2)
        )
        for rows in chunks:
            student_RV, teacher_RV = (buffer[: rows.stop - rows.start] for buffer in (student_buffer, teacher_buffer))
            head.logits(hidden_RH[rows], job.temperature, out=student_RV)
            job.teacher_head.logits(job.teacher_hidden_RH[rows], job.temperature, out=teacher_RV)
            loss_sum, grad_logits_RV = _chunk_loss(student_RV, teacher_RV, rows, job, metrics)
            total += loss_sum
            if grad_logits_RV is None:
                continue
            grad_logits_RV = head.operand(grad_logits_RV, teacher_RV)  # the teacher's logits have been read
            if grad_hidden is not None:
                grad_hidden[rows] = head.hidden_gradient(grad_logits_RV)
            if grad_weight is not None:
                head.add_weight_gradient(grad_weight, grad_logits_RV, hidden_RH[rows])
        ctx.grads, ctx.head = (grad_hidden, grad_weight), head
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        if ctx.grads is None:
            raise RuntimeError("distillation_loss can be differentiated once: its gradients are scaled in place")
        grad_hidden, grad_weight = (None if g is None else g.mul_(grads[0]) for g in ctx.grads)
        ctx.grads = None
        return grad_hidden, _hand_over(grad_weight, ctx.head.weight), None, None


def _hand_over(grad_weight: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    """The head's gradient for autograd, or, where Megatron's DDP keeps it in another type, zeros in its place.

    Autograd would round an fp32 gradient to the bf16 of the weight before DDP adds it to its fp32 buffer
    ``main_grad``; so it is added here.
    """
    main_grad = getattr(weight, "main_grad", None)
    if grad_weight is None or main_grad is None or main_grad.dtype == weight.dtype:
        return grad_weight
    main_grad.add_(grad_weight)
    return weight.new_zeros(()).expand_as(weight)


def _chunk_loss(
    student_RV: torch.Tensor, teacher_RV: torch.Tensor, rows: slice, job: _Job, metrics: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weighted sum over a chunk's rows and its gradient in the student's logits; adds to the metrics."""
    config, dtype = job.config, student_RV.dtype
    weights_R = None if job.weights_R is None else job.weights_R[rows].to(dtype)
    inputs = LossInputs(
        student_logits_RV=student_RV,
        teacher_logits_RV=teacher_RV,
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
    grad_logits_RV: torch.Tensor | None = None
    if config.loss in FUSED_LOSSES:
        scale_R = torch.full_like(inputs.old_logprobs_R, 1 / job.temperature) if job.with_grad else None
        if scale_R is not None and weights_R is not None:
            scale_R = scale_R * weights_R
        loss_R, metrics_R = FUSED_LOSSES[config.loss](Chunk(inputs=inputs, grad_scale_R=scale_R))
        loss_sum = _weighted_sum(loss_R.to(dtype), weights_R)
        if job.with_grad:
            grad_logits_RV = student_RV
            if weights_R is not None:
                grad_logits_RV[weights_R == 0] = 0.0
    else:
        with torch.enable_grad() if job.with_grad else torch.no_grad():
            inputs.student_logits_RV = student_RV.detach().requires_grad_(job.with_grad)
            loss_R, metrics_R = job.loss(inputs)
            loss_sum = _weighted_sum(loss_R, weights_R)
        if job.with_grad:
            (grad_logits_RV,) = torch.autograd.grad(loss_sum, inputs.student_logits_RV)
            grad_logits_RV = grad_logits_RV / job.temperature
    for name, value in metrics_R.items():
        kept_R = value if weights_R is None else value.where(weights_R != 0, 0)
        metrics[name] = metrics.get(name, 0.0) + kept_R.to(dtype).sum()
    return loss_sum.detach(), grad_logits_RV


def _weighted_sum(loss_R: torch.Tensor, weights_R: torch.Tensor | None) -> torch.Tensor:
    """A row of weight 0 leaves the sum whatever its loss is, even where that is not finite."""
    return loss_R.sum() if weights_R is None else (loss_R * weights_R).where(weights_R != 0, 0.0).sum()
