"""How the ranks are laid out over the models."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_taopd.errors import ConfigError

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "distributed_timeout_minutes",
)
_UNEVEN_SPLITS = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


@dataclass(kw_only=True)
class ParallelConfig:
    """Sizes of the model-parallel groups, named as in Megatron; the remaining ranks are data-parallel."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer: heads, ffn and vocabulary are split over them."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are dealt to, in order."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first stage, of both models (default: an even share)."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last stage, of both models (default: an even share)."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as one layer of the first stage."""
    account_for_loss_in_pipeline_split: bool = False
    """Count LM head and loss as one layer of the last stage."""
    context_parallel_size: int = 1
    """Ranks that share a sequence. Not yet supported by this version: must be 1."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a mixture; they are data-parallel ranks elsewhere in the model."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's ffn (default: --tensor-model-parallel-size)."""
    sequence_parallel: bool = False
    """Split what lies between the tensor-parallel regions over the sequence: saves memory, needs TP > 1."""
    distributed_timeout_minutes: int = 10
    """How long a collective may wait for a rank before the run is given up."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{_flag(name)} must be at least 1, got {value}")
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ConfigError(
                "--sequence-parallel has no effect with --tensor-model-parallel-size 1: "
                "raise the tensor-parallel size or drop --sequence-parallel"
            )
        uneven = [_flag(name) for name in _UNEVEN_SPLITS if getattr(self, name)]
        if uneven and self.pipeline_model_parallel_size == 1:
            raise ConfigError(f"{uneven[0]} has no effect with --pipeline-model-parallel-size 1; drop it")
        counted = [flag for flag in uneven if flag.startswith("--account")]
        if counted and len(counted) < len(uneven):
            raise ConfigError(f"{uneven[0]} and {counted[0]} are two ways to split the layers; keep one of them")

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of a model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def expert_parallel_size(self) -> int:
        """Ranks that hold one copy of a model's experts."""
        tensor = self.expert_tensor_parallel_size or self.tensor_model_parallel_size
        return tensor * self.expert_model_parallel_size * self.pipeline_model_parallel_size


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
