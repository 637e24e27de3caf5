"""How the ranks are laid out over the models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_taopd.errors import ConfigError

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_virtual_stages_per_pipeline_rank",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
)
_UNEVEN_SPLITS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
_OF_TEACHER = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


@dataclass(kw_only=True)
class ParallelConfig:
    """Sizes of the model-parallel groups, named as in Megatron; the remaining ranks are data-parallel."""

    flag_prefix = "--"

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer: heads, ffn and vocabulary are split over them."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are dealt to, in order."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Pieces of each model that every stage holds, dealt round and round: shorter bubbles for more messages (default:
    one piece)."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first stage, of both models unless the teacher has a split of its own (default: an even share)."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last stage, of both models unless the teacher has a split of its own (default: an even share)."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as one layer of the first stage."""
    account_for_loss_in_pipeline_split: bool = False
    """Count LM head and loss as one layer of the last stage."""
    context_parallel_size: int = 1
    """Ranks that share a sequence: each holds two chunks of it, so that all have the same work."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a mixture; they are data-parallel ranks elsewhere in the model."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's ffn (default: --tensor-model-parallel-size)."""
    sequence_parallel: bool = False
    """Split what lies between the tensor-parallel regions over the sequence: saves memory, needs TP > 1."""
    distributed_timeout_minutes: float = 10
    """How long a collective may wait for a rank, and a rank take for a piece of work, before the run is given up."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{self.flag(name)} must be at least 1, got {value}")
        if not self.distributed_timeout_minutes > 0:
            raise ConfigError(
                f"{self.flag('distributed_timeout_minutes')} {self.distributed_timeout_minutes} must be positive"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "--sequence-parallel has no effect with --tensor-model-parallel-size 1: "
                "raise the tensor-parallel size or drop --sequence-parallel"
            )
        uneven = [name for name in _UNEVEN_SPLITS if getattr(self, name)]
        if uneven and self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"{self.flag(uneven[0])} has no effect with {self.flag('pipeline_model_parallel_size')} 1; drop it"
            )
        self._check_virtual_stages()
        counted = [name for name in uneven if name.startswith("account")]
        if counted and len(counted) < len(uneven):
            raise ConfigError(
                f"{self.flag(uneven[0])} and {self.flag(counted[0])} are two ways to split the layers; keep one of them"
            )

    def _check_virtual_stages(self) -> None:
        virtual = self.num_virtual_stages_per_pipeline_rank
        if virtual is None:
            return
        if virtual == 1 or self.pipeline_model_parallel_size == 1:
            raise ConfigError(
                f"--num-virtual-stages-per-pipeline-rank {virtual} has no effect with --pipeline-model-parallel-size "
                f"{self.pipeline_model_parallel_size}: both must be at least 2; drop it"
            )
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        if self.pipeline_model_parallel_size == 2 and first is not None and last is not None:
            raise ConfigError(
                f"--decoder-first-pipeline-num-layers {first} and --decoder-last-pipeline-num-layers {last}: with "
                "virtual stages megatron-core divides by the number of stages between them, here 0; drop one of the "
                "flags, which the other implies"
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of a model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_parallel_size(self) -> int:
        """Ranks that hold one copy of a model's experts."""
        tensor = self.expert_tensor_parallel_size or self.tensor_model_parallel_size
        return tensor * self.expert_model_parallel_size * self.pipeline_model_parallel_size

    def check_world_size(self, world_size: int) -> None:
        """Refuse a number of ranks that this layout does not divide.

        Raises:
            ConfigError: not a multiple of TP x PP x CP, or of ETP x EP x PP.
        """
        tensor_flag, stages_flag = self.flag("tensor_model_parallel_size"), self.flag("pipeline_model_parallel_size")
        if world_size % self.model_parallel_size:
            raise ConfigError(
                f"{world_size} ranks cannot hold whole models of {tensor_flag} {self.tensor_model_parallel_size} x "
                f"{stages_flag} {self.pipeline_model_parallel_size} x --context-parallel-size "
                f"{self.context_parallel_size} = {self.model_parallel_size} ranks each; start a multiple of "
                f"{self.model_parallel_size} ranks (torchrun --nproc-per-node) or change the layout"
            )
        if world_size % self.expert_parallel_size:
            tensor = self.expert_tensor_parallel_size or self.tensor_model_parallel_size
            raise ConfigError(
                f"{world_size} ranks cannot hold whole sets of experts of {self.flag('expert_tensor_parallel_size')} "
                f"{tensor} x {self.flag('expert_model_parallel_size')} {self.expert_model_parallel_size} x "
                f"{stages_flag} {self.pipeline_model_parallel_size} = {self.expert_parallel_size} ranks each; start a "
                f"multiple of {self.expert_parallel_size} ranks or change the layout"
            )

    @property
    def shares_experts(self) -> bool:
        """Whether data-parallel replicas may hold different experts, or different shards of them."""
        return self.expert_model_parallel_size > 1 or self.expert_tensor_parallel_size not in (
            None,
            self.tensor_model_parallel_size,
        )

    def _shares(self) -> tuple[int | None, ...]:
        """What decides who holds which part of a model."""
        expert_tensor = self.expert_tensor_parallel_size or self.tensor_model_parallel_size
        sizes = (self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.expert_model_parallel_size)
        return (*sizes, expert_tensor, *(getattr(self, name) for name in _UNEVEN_SPLITS))

    @classmethod
    def flag(cls, name: str) -> str:
        """The flag of a field, as messages show it."""
        return cls.flag_prefix + name.replace("_", "-")


class TeacherLayout(ParallelConfig):
    """The layout of a teacher that is cut in another way than the student."""

    flag_prefix = "--teacher-"


@dataclass(kw_only=True)
class TeacherParallelConfig:
    """The teacher's own layout, on the same ranks as the student's."""

    teacher_tensor_model_parallel_size: int | None = None
    """Ranks that share each layer of the teacher (default: as the student)."""
    teacher_pipeline_model_parallel_size: int | None = None
    """Stages that the teacher's layers are dealt to (default: as the student)."""
    teacher_decoder_first_pipeline_num_layers: int | None = None
    """Layers of the teacher's first stage. With this or one of the next three flags its split is what they say; without
    any it is the student's where the teacher has as many stages, else even."""
    teacher_decoder_last_pipeline_num_layers: int | None = None
    """Layers of the teacher's last stage (default: see --teacher-decoder-first-pipeline-num-layers)."""
    teacher_account_for_embedding_in_pipeline_split: bool = False
    """Count the teacher's embedding as one layer of its first stage."""
    teacher_account_for_loss_in_pipeline_split: bool = False
    """Count one layer less in the teacher's last stage, as with its LM head, which the student's last stage holds."""
    teacher_expert_model_parallel_size: int | None = None
    """Ranks that share the teacher's experts (default: as the student)."""
    teacher_expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert of the teacher (default: the student's --expert-tensor-parallel-size where that is
    given, else the teacher's tensor-parallel size)."""

    def __post_init__(self) -> None:
        for name in (*_OF_TEACHER, *_UNEVEN_SPLITS):
            value = self._given(name)
            if value is not None and value is not False and value < 1:
                raise ConfigError(f"{TeacherLayout.flag(name)} must be at least 1, got {value}")

    def _given(self, name: str) -> int | None:
        return getattr(self, f"teacher_{name}")

    def _split(self, student: ParallelConfig, stages: int) -> dict[str, Any]:
        """How the teacher's layers are dealt to its stages."""
        own = {name: self._given(name) for name in _UNEVEN_SPLITS if self._given(name)}
        if own or stages != student.pipeline_model_parallel_size:
            return own
        return {name: getattr(student, name) for name in _UNEVEN_SPLITS}

    def resolve(self, student: ParallelConfig) -> TeacherLayout | None:
        """The teacher's layout; None where it is the student's.

        What has no flag of its own is the student's as far as it can be: sequence parallelism where there are
        tensor-parallel ranks, the split of the layers where there are as many stages. The teacher reads whole
        sequences.

        Raises:
            ConfigError: a flag of the teacher's that has no effect or contradicts another.
        """
        sizes: dict[str, Any] = {name: self._given(name) or getattr(student, name) for name in _OF_TEACHER}
        layout = TeacherLayout(
            **sizes,
            **self._split(student, sizes["pipeline_model_parallel_size"]),
            sequence_parallel=student.sequence_parallel and sizes["tensor_model_parallel_size"] > 1,
            distributed_timeout_minutes=student.distributed_timeout_minutes,
        )
        return None if layout._shares() == student._shares() else layout
