"""Student and teacher as one pair: checked against each other first, loaded afterwards."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from megatron_taopd.data.tokenizer import check_tokenizers_agree, load_tokenizer
from megatron_taopd.models import (
    LoadedModel,
    load_hf_config,
    load_model,
    pad_vocab_size,
    refuse_expert_layout_in_vain,
)
from megatron_taopd.ops.head import HeadShard
from megatron_taopd.platform import device, distributed, has_cuda
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.run_config import ModelPairConfig, PrecisionConfig, RecomputeConfig
from megatron_taopd.training.offload import OffloadedWeights

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ModelPair:
    """Both models of this rank, built with one padded vocabulary so that their head shards line up."""

    student: LoadedModel
    teacher: LoadedModel
    vocab_size: int
    """Common real vocabulary: ids below it exist in both models."""
    tokenizer: Any | None
    """Tokenizer of the pair, or None where neither directory has one (token ids only)."""
    offloaded: OffloadedWeights | None = None
    """The teacher's weights but for its LM head, where they live in host memory."""

    def teacher_on_device(self) -> AbstractContextManager[None]:
        """The block in which the teacher may run a forward pass. Its LM head can be used outside, too."""
        return nullcontext() if self.offloaded is None else self.offloaded.on_device()

    def student_head(self) -> HeadShard:
        """LM-head shard of the student; on the last pipeline stage only."""
        return self._head(self.student)

    def teacher_head(self) -> HeadShard:
        """LM-head shard of the teacher; on the last pipeline stage only."""
        return self._head(self.teacher)

    def _head(self, model: LoadedModel) -> HeadShard:
        return HeadShard.for_rank(model.module.head_weight(), self.vocab_size, distributed.tensor_parallel_group())


def params_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Type of the weights and activations."""
    return torch.bfloat16 if precision.bf16 else torch.float32


def teacher_params_dtype(models: ModelPairConfig, precision: PrecisionConfig) -> torch.dtype:
    """Type of the teacher's weights and activations."""
    if models.teacher_dtype is None:
        return params_dtype(precision)
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[models.teacher_dtype]


def precision_overrides(precision: PrecisionConfig) -> dict[str, Any]:
    """TransformerConfig fields of the number formats."""
    if precision.fp8_format is None:
        return {}
    return {"fp8": precision.fp8_format, "fp8_recipe": precision.fp8_recipe or "tensorwise"}


def load_pair(
    models: ModelPairConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    train_student: bool,
    recompute: RecomputeConfig | None = None,
    offload_teacher: bool = False,
) -> ModelPair:
    """Check that the two models can be compared token by token, then load one after the other at this rank's place.

    Args:
        offload_teacher: the teacher's weights live in host memory outside ``ModelPair.teacher_on_device``.

    Raises:
        TokenizerMismatchError: an id means different tokens, or the stop tokens differ.
        ModelError: a directory is incomplete, an architecture unknown, weights unusable.
        ConfigError: the layout does not divide a model.
    """
    student_hf, teacher_hf = load_hf_config(models.student), load_hf_config(models.teacher)
    refuse_expert_layout_in_vain(parallel, student_hf, teacher_hf)
    check_tokenizers_agree(models.student, models.teacher, allow_stop_token_mismatch=models.allow_stop_token_mismatch)
    tokenizer = load_tokenizer(models.student) or load_tokenizer(models.teacher)
    vocab_size = min(student_hf.vocab_size, teacher_hf.vocab_size)
    if student_hf.vocab_size != teacher_hf.vocab_size:
        logger.info(
            "vocabularies differ (student %d, teacher %d): the %d common ids are used",
            student_hf.vocab_size,
            teacher_hf.vocab_size,
            vocab_size,
        )
    padded = pad_vocab_size(student_hf.vocab_size, teacher_hf.vocab_size, tp=parallel.tensor_model_parallel_size)
    overrides = precision_overrides(precision)
    student_overrides = dict(overrides)
    if recompute is not None and recompute.recompute_granularity is not None:
        student_overrides.update(
            recompute_granularity=recompute.recompute_granularity,
            recompute_method=recompute.recompute_method,
            recompute_num_layers=recompute.recompute_num_layers,
        )
    student = load_model(
        models.student,
        parallel,
        params_dtype=params_dtype(precision),
        padded_vocab_size=padded,
        trainable=train_student,
        overrides=student_overrides,
    )
    teacher = load_model(
        models.teacher,
        parallel,
        params_dtype=teacher_params_dtype(models, precision),
        padded_vocab_size=padded,
        trainable=False,
        overrides=overrides,
    )
    return ModelPair(
        student=student,
        teacher=teacher,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        offloaded=_offload(teacher) if offload_teacher and can_offload("--offload-teacher") else None,
    )


def can_offload(flag: str) -> bool:
    """Whether there is device memory to save; says so in a warning where there is none."""
    if not has_cuda():
        logger.warning("%s: this machine has no GPU, so everything is in host memory already", flag)
    return has_cuda()


def _offload(teacher: LoadedModel) -> OffloadedWeights:
    head = [teacher.module.head_weight()] if distributed.is_last_stage() else []
    offloaded = OffloadedWeights(teacher.module, device=device(), stay=head)
    logger.info("teacher: %.2f GiB of weights a rank wait in host memory", offloaded.num_bytes / 2**30)
    return offloaded
