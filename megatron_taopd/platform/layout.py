"""How the ranks are laid out over the models."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_taopd.errors import ConfigError


@dataclass(kw_only=True)
class ParallelConfig:
    """Sizes of the model-parallel groups, named as in Megatron; the remaining ranks are data-parallel."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer: heads, ffn and vocabulary are split over them."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are dealt to, in order."""
    context_parallel_size: int = 1
    """Ranks that share a sequence. Not yet supported by this version: must be 1."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a mixture. Not yet supported by this version: must be 1."""
    sequence_parallel: bool = False
    """Split what lies between the tensor-parallel regions over the sequence: saves memory, needs TP > 1."""
    distributed_timeout_minutes: int = 10
    """How long a collective may wait for a rank before the run is given up."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "distributed_timeout_minutes",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{_flag(name)} must be at least 1, got {value}")
        for name in ("context_parallel_size", "expert_model_parallel_size"):
            value = getattr(self, name)
            if value > 1:
                raise ConfigError(f"{_flag(name)} {value} is not yet supported by this version; leave it at 1")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "--sequence-parallel has no effect with --tensor-model-parallel-size 1: "
                "raise the tensor-parallel size or drop --sequence-parallel"
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of a model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
