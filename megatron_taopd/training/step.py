"""The training forward step, in the shape that Megatron's schedules (and its ``pretrain``) call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.losses import LossConfig, distillation_loss
from megatron_taopd.platform import distributed
from megatron_taopd.training.forward import call_model, pick_rows
from megatron_taopd.training.importance import importance_weights
from megatron_taopd.training.offload import HeldRows
from megatron_taopd.training.pair import ModelPair


@dataclass(kw_only=True)
class KeptTargets:
    """What the loss needs of a micro-batch's kept positions (K of them); all of it detached."""

    row_index_K: torch.Tensor
    """Rows of the flattened [S·B] hidden states that predict the kept tokens."""
    token_ids_K: torch.Tensor
    old_logprobs_K: torch.Tensor
    """log p_s(y) of the policy that sampled the token (nats)."""
    teacher_rows_KH: HeldRows
    num_tokens: int
    """What this micro-batch adds to the count the loss is divided by: kept tokens, or valid ones."""
    weights_K: torch.Tensor | None = None
    """Factors of the losses (None: 1)."""
    report: dict[str, torch.Tensor] = field(default_factory=dict)
    """Sums over the kept tokens for the metrics."""


@dataclass(kw_only=True)
class TrainMicroBatch:
    """A micro-batch of tokens; on last-stage ranks with its targets, or with what makes them."""

    tokens: MicroBatch
    targets: KeptTargets | None = None
    choose: Callable[[torch.Tensor], KeptTargets] | None = None
    """Targets from the student's hidden states, where the choice is made inside the training forward."""


def keep_targets(
    micro_batch: MicroBatch,
    keep_R: torch.Tensor,
    student_logprob_R: torch.Tensor,
    teacher_rows: HeldRows,
    config: LossConfig,
) -> KeptTargets:
    """The kept positions of a micro-batch. The teacher's hidden states of the other rows are let go.

    Last-stage ranks call it together.
    """
    recorded = micro_batch.rollout_logprobs_R
    old_logprobs_R = student_logprob_R if recorded is None else recorded
    teacher_rows.keep(keep_R)
    report: dict[str, torch.Tensor] = {}
    if recorded is not None:
        report["rollout_logprob_gap"] = (student_logprob_R - recorded)[keep_R].abs().double().sum()
    weights_K = None
    if config.importance_ratio != "none":
        clip = config.resolved_importance_ratio_clip
        group = distributed.context_parallel_group()
        weights_R = importance_weights(config.importance_ratio, student_logprob_R, micro_batch, clip=clip, group=group)
        weights_K = weights_R[keep_R]
        report["importance_weight"] = weights_K.sum()
        report["importance_weight_clipped_share"] = (weights_K >= clip).double().sum()
    return KeptTargets(
        row_index_K=micro_batch.row_index_R[keep_R],
        token_ids_K=micro_batch.token_ids_R[keep_R],
        old_logprobs_K=old_logprobs_R[keep_R],
        teacher_rows_KH=teacher_rows,
        num_tokens=int(keep_R.sum()) if config.loss_normalization == "kept" else keep_R.numel(),
        weights_K=weights_K,
        report=report,
    )


@dataclass(kw_only=True)
class DistillationForwardStep:
    """``forward_step(data_iterator, model) -> (output, loss_func)`` with the loss on the kept rows only.

    ``loss_func`` answers Megatron's triple (loss sum, number of tokens, report): with
    ``calculate_per_token_loss`` the schedule divides once by the count of the whole global batch.
    """

    pair: ModelPair
    loss: LossConfig
    support_k: int
    temperature: float
    logits_chunk_bytes: int

    def __call__(
        self, data_iterator: Iterator[TrainMicroBatch], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable]:
        batch = next(data_iterator)
        return call_model(model, batch.tokens), partial(self.loss_func, batch)

    def loss_func(
        self, batch: TrainMicroBatch, hidden_SBH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the kept rows of one micro-batch; called on the last stage."""
        targets = batch.targets if batch.choose is None else batch.choose(hidden_SBH.detach())
        assert targets is not None, "last-stage ranks have targets"
        loss_sum, metrics = distillation_loss(
            pick_rows(hidden_SBH, targets.row_index_K, self.pair.student.config),
            targets.teacher_rows_KH.read(),
            targets.token_ids_K,
            targets.old_logprobs_K,
            self.pair.student_head(),
            self.pair.teacher_head(batch.tokens.teacher),
            config=self.loss,
            k=self.support_k,
            temperature=self.temperature,
            weights_R=targets.weights_K,
            logits_chunk_bytes=self.logits_chunk_bytes,
        )
        num_tokens = torch.tensor(targets.num_tokens, dtype=torch.int, device=loss_sum.device)
        report = {"loss_sum": loss_sum.detach(), **metrics, **targets.report}
        return loss_sum, num_tokens, report
