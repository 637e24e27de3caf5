"""Student and teachers as one pair: checked against each other first, loaded afterwards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from megatron_taopd.data.tokenizer import check_tokenizers_agree, load_tokenizer
from megatron_taopd.errors import ConfigError
from megatron_taopd.fp8_config import TeacherFp8Config
from megatron_taopd.models import (
    HFModelConfig,
    LoadedModel,
    check_layout,
    fp8_fields,
    load_head,
    load_hf_config,
    load_model,
    pad_vocab_size,
    refuse_expert_layout_in_vain,
)
from megatron_taopd.ops.fp8 import Fp8Head
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
    teachers: list[Teacher]
    vocab_size: int
    """Common real vocabulary: ids below it exist in both models."""
    tokenizer: Any | None
    """Tokenizer of the pair, or None where neither directory has one (token ids only)."""
    _fp8_heads: dict[str | int, Fp8Head] = field(default_factory=dict)

    def student_head(self) -> HeadShard:
        """LM-head shard of the student; on the last pipeline stage only."""
        return self._head(self.student.module.head_weight())

    def teacher_head(self, index: int = 0) -> HeadShard:
        """LM-head shard of a teacher, cut like the student's; on the student's last pipeline stage only."""
        weight = self.teachers[index].head_weight
        assert weight is not None, "last-stage ranks have an LM head"
        return self._head(weight)

    def fp8_heads(self, teacher: int = 0) -> tuple[Fp8Head, Fp8Head]:
        """Both shards in FP8, made when they are first asked for and kept: the teachers' for good, the student's until
        :meth:`student_has_changed`."""
        for key, exact in (("student", self.student_head), (teacher, lambda: self.teacher_head(teacher))):
            if key not in self._fp8_heads:
                self._fp8_heads[key] = Fp8Head.of(exact())
        return self._fp8_heads["student"], self._fp8_heads[teacher]

    def student_has_changed(self) -> None:
        """Its weights are others than before; every optimizer step says so."""
        self._fp8_heads.pop("student", None)

    @property
    def teacher_names(self) -> list[str | None]:
        """In the order in which they read; None for one without a name."""
        return [teacher.name for teacher in self.teachers]

    @property
    def given_names(self) -> list[str]:
        """The names that there are."""
        return [name for name in self.teacher_names if name is not None]

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


def load_pair(
    models: ModelPairConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    train_student: bool,
    recompute: RecomputeConfig | None = None,
    offload_teacher: bool = False,
    teacher_parallel: TeacherParallelConfig | None = None,
    teacher_fp8: TeacherFp8Config | None = None,
) -> ModelPair:
    """Check that the models can be compared token by token, then load one after the other at this rank's place.

    Args:
        parallel: the layout in force, the student's.
        offload_teacher: the teacher's weights live in host memory outside ``Teacher.on_device``.
        teacher_parallel: the teacher's own layout (default: the student's).
        teacher_fp8: FP8 in the teacher's layers; those of ``precision`` are the student's.

    Raises:
        TokenizerMismatchError: an id means different tokens, or the stop tokens differ.
        ModelError: a directory is incomplete, an architecture unknown, weights unusable.
        ConfigError: the layout does not divide a model, or FP8 cannot be had.
    """
    student_hf = load_hf_config(models.student)
    teachers = models.named_teachers()
    teacher_hfs = [load_hf_config(path) for _, path in teachers]
    refuse_expert_layout_in_vain(parallel, student_hf, *teacher_hfs)
    check_layout(student_hf, parallel)  # before the teachers', which have flags of their own to answer with
    own_layout = _lay_out_teachers(teacher_parallel, parallel, teacher_hfs)
    student_overrides = fp8_fields(precision.fp8_settings(), student_hf, parallel, trained=train_student)
    teacher_layout = parallel if own_layout is None else own_layout.config
    teacher_settings = None if teacher_fp8 is None else teacher_fp8.fp8_settings()
    teacher_overrides = [fp8_fields(teacher_settings, hf, teacher_layout, trained=False) for hf in teacher_hfs][0]
    for _, path in teachers:
        check_tokenizers_agree(models.student, path, allow_stop_token_mismatch=models.allow_stop_token_mismatch)
    tokenizers = (load_tokenizer(path) for path in (models.student, *(path for _, path in teachers)))
    tokenizer = next((found for found in tokenizers if found is not None), None)
    sizes = [hf.vocab_size for hf in (student_hf, *teacher_hfs)]
    vocab_size = min(sizes)
    if vocab_size != max(sizes):
        logger.info(
            "vocabularies differ (student %d, teacher %s): the %d common ids are used",
            student_hf.vocab_size,
            ", ".join(map(str, sizes[1:])),
            vocab_size,
        )
    padded = pad_vocab_size(*sizes, tp=parallel.tensor_model_parallel_size)
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
    offload = offload_teacher and can_offload("--offload-teacher")
    routes = None if own_layout is None else Routes(own_layout)
    return ModelPair(
        student=student,
        teachers=[
            _load_teacher(
                name,
                path,
                parallel,
                routes,
                params_dtype=teacher_params_dtype(models, precision),
                padded_vocab_size=padded,
                overrides=teacher_overrides,
                offload=offload,
            )
            for name, path in teachers
        ],
        vocab_size=vocab_size,
        tokenizer=tokenizer,
    )


def _lay_out_teachers(
    asked: TeacherParallelConfig | None, parallel: ParallelConfig, teachers: Sequence[HFModelConfig]
) -> SecondLayout | None:
    """The groups of the teachers' own layout, refused where it divides neither the ranks nor a model."""
    layout = None if asked is None else asked.resolve(parallel)
    if asked is None:
        return None
    if layout is None:
        for teacher in teachers:
            try:
                check_layout(teacher, parallel)
            except ConfigError as error:
                raise ConfigError(
                    f"{error}; or give the teacher a layout of its own (--teacher-pipeline-model-parallel-size, "
                    "--teacher-decoder-first-pipeline-num-layers and the like, see docs/parallelism.md)"
                ) from error
        return None
    if asked.teacher_expert_model_parallel_size or asked.teacher_expert_tensor_parallel_size:
        refuse_expert_layout_in_vain(layout, *teachers)
    for teacher in teachers:
        check_layout(teacher, layout)
    return SecondLayout(layout)


def _load_teacher(
    name: str | None,
    source: str,
    parallel: ParallelConfig,
    routes: Routes | None,
    *,
    params_dtype: torch.dtype,
    padded_vocab_size: int,
    overrides: dict[str, Any],
    offload: bool,
) -> Teacher:
    """A teacher at the student's layout ``parallel``, or at one of its own with its LM head cut like the student's."""
    load = partial(load_model, source, params_dtype=params_dtype, trainable=False, overrides=overrides)
    if routes is None:
        model = load(parallel, padded_vocab_size=padded_vocab_size)
        head_weight = model.module.head_weight() if distributed.is_last_stage() else None
    else:
        with routes.layout.in_force():
            model = load(routes.layout.config, head=False)
        head_weight = load_head(source, params_dtype=params_dtype, padded_vocab_size=padded_vocab_size)
    offloaded = None
    if offload:
        stay = [] if head_weight is None else [head_weight]
        offloaded = OffloadedWeights(torch.nn.ModuleList(model.modules), device=device(), stay=stay)
        logger.info("teacher: %.2f GiB of weights a rank wait in host memory", offloaded.num_bytes / 2**30)
    return Teacher(name=name, model=model, head_weight=head_weight, routes=routes, offloaded=offloaded)


def can_offload(flag: str) -> bool:
    """Whether there is device memory to save; says so in a warning where there is none."""
    if not has_cuda():
        logger.warning("%s: this machine has no GPU, so everything is in host memory already", flag)
    return has_cuda()
