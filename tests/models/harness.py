"""Runs in the ranks: forward passes through Megatron's schedule, whole logits back."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_taopd.models import LoadedModel, load_model
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig

Layout = dict[str, Any]

LAYOUTS: dict[str, Layout] = {
    "TP1": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP2-PP2-SP": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    },
    "PP2-first1": {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1},
    "EP2": {"expert_model_parallel_size": 2},
    "TP2-EP2-SP": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "sequence_parallel": True},
    "TP2-ETP1-PP2-SP": {
        "tensor_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
        "pipeline_model_parallel_size": 2,
        "sequence_parallel": True,
    },
}
THREE_RANKS: dict[str, Layout] = {
    "TP3": {"tensor_model_parallel_size": 3},
    "PP3-counted": {
        "pipeline_model_parallel_size": 3,
        "account_for_embedding_in_pipeline_split": True,
        "account_for_loss_in_pipeline_split": True,
    },
}


def start(layout: str, seed: int = 1) -> ParallelConfig:
    """Lay the ranks out as the layout says; ranks to spare are data-parallel."""
    parallel = ParallelConfig(**(LAYOUTS | THREE_RANKS)[layout])
    distributed.initialize(parallel, seed=seed)
    return parallel


def load(path: str, parallel: ParallelConfig, **settings: Any) -> LoadedModel:
    """A model for comparison: fp32, not trainable unless told."""
    return load_model(
        path,
        parallel,
        **({"params_dtype": torch.float32, "trainable": False} | settings),
    )


def full_logits(loaded: LoadedModel, hidden_SBH: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, padded V] from what the last stage answered."""
    if loaded.config.sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH)
    local = hidden_SBH @ loaded.module.head_weight().T
    shards = [torch.empty_like(local) for _ in range(distributed.tensor_parallel_size())]
    dist.all_gather(shards, local.contiguous(), group=distributed.tensor_parallel_group())
    return torch.cat(shards, dim=-1).transpose(0, 1)


def forward_logits(loaded: LoadedModel, tokens_BS: torch.Tensor) -> torch.Tensor | None:
    """Logits [B, S, real V] of one micro-batch on last-stage ranks, None elsewhere."""

    def keep(hidden_SBH: torch.Tensor, *, non_loss_data: bool) -> torch.Tensor:
        return full_logits(loaded, hidden_SBH)[..., : loaded.hf.vocab_size]

    def forward_step(iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        tokens = next(iterator)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(tokens, positions, None), partial(keep)

    with torch.no_grad():
        out = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([tokens_BS]),
            model=loaded.module,
            num_microbatches=1,
            seq_length=tokens_BS.shape[1],
            micro_batch_size=tokens_BS.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return out[0] if distributed.is_last_stage() else None
