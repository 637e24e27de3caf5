"""Student and teacher as one pair: checked against each other first, loaded afterwards."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_taopd.data.tokenizer import check_tokenizers_agree, load_tokenizer
from megatron_taopd.models import (
    HFModelConfig,
    LoadedModel,
    check_layout,
    load_head,
    load_hf_config,
    load_model,
    pad_vocab_size,
    refuse_expert_layout_in_vain,
)
from megatron_taopd.ops.head import HeadShard
from megatron_taopd.platform import device, distributed, has_cuda
from megatron_taopd.platform.layout import ParallelConfig, TeacherParallelConfig
from megatron_taopd.platform.layouts import SecondLayout
from megatron_taopd.run_config import ModelPairConfig, PrecisionConfig, RecomputeConfig
from megatron_taopd.training.exchange import Routes
from megatron_taopd.training.offload import OffloadedWeights
from megatron_taopd.training.teachers import Teacher

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ModelPair:
    """Both models of this rank, with one padded vocabulary so that their head shards line up."""

    student: LoadedModel
    teacher: Teacher
    vocab_size: int
    """Common real vocabulary: ids below it exist in both models."""
    tokenizer: Any | None
    """Tokenizer of the pair, or None where neither directory has one (token ids only)."""

    def student_head(self) -> HeadShard:
        """LM-head shard of the student; on the last pipeline stage only."""
        return self._head(self.student.module.head_weight())

    def teacher_head(self) -> HeadShard:
        """LM-head shard of the teacher, cut like the student's; on the student's last pipeline stage only."""
        assert self.teacher.head_weight is not None, "last-stage ranks have an LM head"
        return self._head(self.teacher.head_weight)

    def _head(self, weight: torch.Tensor) -> HeadShard:
        return HeadShard.for_rank(weight, self.vocab_size, distributed.tensor_parallel_group())


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
    teacher_parallel: TeacherParallelConfig | None = None,
) -> ModelPair:
    """Check that the two models can be compared token by token, then load one after the other at this rank's place.

    Args:
        parallel: the layout in force, the student's.
        offload_teacher: the teacher's weights live in host memory outside ``Teacher.on_device``.
        teacher_parallel: the teacher's own layout (default: the student's).

    Raises:
        TokenizerMismatchError: an id means different tokens, or the stop tokens differ.
        ModelError: a directory is incomplete, an architecture unknown, weights unusable.
        ConfigError: the layout does not divide a model.
    """
    student_hf, teacher_hf = load_hf_config(models.student), load_hf_config(models.teacher)
    refuse_expert_layout_in_vain(parallel, student_hf, teacher_hf)
    own_layout = _lay_out_teacher(teacher_parallel, parallel, teacher_hf)
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
    teacher = _load_teacher(
        models.teacher,
        parallel,
        own_layout,
        params_dtype=teacher_params_dtype(models, precision),
        padded_vocab_size=padded,
        overrides=overrides,
        offload=offload_teacher and can_offload("--offload-teacher"),
    )
    return ModelPair(student=student, teacher=teacher, vocab_size=vocab_size, tokenizer=tokenizer)


def _lay_out_teacher(
    asked: TeacherParallelConfig | None, parallel: ParallelConfig, teacher: HFModelConfig
) -> SecondLayout | None:
    """The groups of a teacher's own layout, refused where it divides neither the ranks nor the model."""
    layout = None if asked is None else asked.resolve(parallel)
    if asked is None or layout is None:
        return None
    if asked.teacher_expert_model_parallel_size or asked.teacher_expert_tensor_parallel_size:
        refuse_expert_layout_in_vain(layout, teacher)
    check_layout(teacher, layout)
    return SecondLayout(layout)


def _load_teacher(
    source: str,
    parallel: ParallelConfig,
    own_layout: SecondLayout | None,
    *,
    params_dtype: torch.dtype,
    padded_vocab_size: int,
    overrides: dict[str, Any],
    offload: bool,
) -> Teacher:
    """A teacher at the student's layout ``parallel``, or at one of its own with its LM head cut like the student's."""
    load = partial(load_model, source, params_dtype=params_dtype, trainable=False, overrides=overrides)
    if own_layout is None:
        model = load(parallel, padded_vocab_size=padded_vocab_size)
        head_weight = model.module.head_weight() if distributed.is_last_stage() else None
    else:
        with own_layout.in_force():
            model = load(own_layout.config, head=False)
        head_weight = load_head(source, params_dtype=params_dtype, padded_vocab_size=padded_vocab_size)
    offloaded = None
    if offload:
        modules = torch.nn.ModuleList(model.modules)
        offloaded = OffloadedWeights(modules, device=device(), stay=[] if head_weight is None else [head_weight])
        logger.info("teacher: %.2f GiB of weights a rank wait in host memory", offloaded.num_bytes / 2**30)
    return Teacher(
        model=model,
        head_weight=head_weight,
        layout=own_layout,
        routes=None if own_layout is None else Routes(own_layout),
        offloaded=offloaded,
    )


def can_offload(flag: str) -> bool:
    """Whether there is device memory to save; says so in a warning where there is none."""
    if not has_cuda():
        logger.warning("%s: this machine has no GPU, so everything is in host memory already", flag)
    return has_cuda()
