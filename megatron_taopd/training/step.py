"""The training forward step, in the shape that Megatron's schedules (and its ``pretrain``) call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from megatron_taopd.data.batches import MicroBatch
from megatron_taopd.losses import LossConfig, distillation_loss
from megatron_taopd.ops.rows import gather_rows
from megatron_taopd.platform import distributed
from megatron_taopd.teachability import Selection
from megatron_taopd.training.pair import ModelPair
from megatron_taopd.training.scoring import ScoredRows


@dataclass(kw_only=True)
class KeptTargets:
    """What the loss needs of a micro-batch's kept positions (K of them); all of it detached."""

    row_index_K: torch.Tensor
    """Rows of the flattened [S·B] hidden states that predict the kept tokens."""
    token_ids_K: torch.Tensor
    old_logprobs_K: torch.Tensor
    """log p_s(y) of the policy that sampled the token (nats)."""
    teacher_hidden_KH: torch.Tensor
    num_tokens: int
    """What this micro-batch adds to the count the loss is divided by: kept tokens, or valid ones."""


@dataclass(kw_only=True)
class TrainMicroBatch:
    """A micro-batch of tokens; with its targets on last-stage ranks."""

    tokens: MicroBatch
    targets: KeptTargets | None


def with_targets(
    micro_batches: list[MicroBatch],
    scored: ScoredRows | None,
    selection: Selection | None,
    config: LossConfig,
) -> list[TrainMicroBatch]:
    """Attach the kept positions to their micro-batches. Teacher hidden states of the other rows are let go."""
    if scored is None or selection is None:
        return [TrainMicroBatch(tokens=m, targets=None) for m in micro_batches]
    keeps = selection.keep.split(scored.rows_per_micro_batch)
    student_logprobs = scored.statistics.student_logprob.split(scored.rows_per_micro_batch)
    result = []
    for i, (micro_batch, keep, student_logprob) in enumerate(zip(micro_batches, keeps, student_logprobs, strict=True)):
        recorded = micro_batch.rollout_logprobs_R
        old_logprobs = student_logprob if recorded is None else recorded
        targets = KeptTargets(
            row_index_K=micro_batch.row_index_R[keep],
            token_ids_K=micro_batch.token_ids_R[keep],
            old_logprobs_K=old_logprobs[keep],
            teacher_hidden_KH=scored.teacher_hidden[i][keep],
            num_tokens=int(keep.sum()) if config.loss_normalization == "kept" else keep.numel(),
        )
        scored.teacher_hidden[i] = targets.teacher_hidden_KH
        result.append(TrainMicroBatch(tokens=micro_batch, targets=targets))
    return result


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
        hidden_SBH = model(batch.tokens.tokens_BS, batch.tokens.position_ids_BS, None)
        return hidden_SBH, partial(self.loss_func, batch.targets)

    def loss_func(
        self, targets: KeptTargets | None, hidden_SBH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of the kept rows of one micro-batch; called on the last stage."""
        assert targets is not None, "last-stage ranks have targets"
        student_hidden_KH = gather_rows(
            hidden_SBH,
            targets.row_index_K,
            group=distributed.tensor_parallel_group(),
            sequence_parallel=self.pair.student.config.sequence_parallel,
        )
        loss_sum, metrics = distillation_loss(
            student_hidden_KH,
            targets.teacher_hidden_KH,
            targets.token_ids_K,
            targets.old_logprobs_K,
            self.pair.student_head(),
            self.pair.teacher_head(),
            config=self.loss,
            k=self.support_k,
            temperature=self.temperature,
            logits_chunk_bytes=self.logits_chunk_bytes,
        )
        num_tokens = torch.tensor(targets.num_tokens, dtype=torch.int, device=loss_sum.device)
        report = {"loss_sum": loss_sum.detach(), **metrics}
        return loss_sum, num_tokens, report
