"""Runs in the ranks: the bytes that a trained model really holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from megatron_taopd.models import load_model
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig
from tests.platform.training import prepare, train_step


def held_bytes(path: str, layout: dict[str, Any], *, bf16: bool, distributed_optimizer: bool) -> dict[str, int]:
    """Weights, DDP's gradient buffers and optimizer of this rank after a step."""
    parallel = ParallelConfig(**layout)
    distributed.initialize(parallel, seed=1)
    dtype = torch.bfloat16 if bf16 else torch.float32
    loaded = load_model(path, parallel, params_dtype=dtype, trainable=True)
    ddp, optimizer = prepare(loaded, optimizer="adam", lr=1e-3, distributed_optimizer=distributed_optimizer)
    train_step(loaded, ddp, optimizer)
    weights = list(loaded.module.parameters())
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = [part.optimizer for part in parts]
    main = [p for adam in inner for group in adam.param_groups for p in group["params"]]
    states = [t for adam in inner for state in adam.state.values() for t in state.values()]
    kept = [t for t in main + states if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in own]
    return {
        "stage": distributed.pipeline_parallel_rank(),
        "parameters": sum(weight.numel() * weight.element_size() for weight in weights),
        "gradients": storage_bytes(buffer.grad_data for buffer in ddp.buffers + ddp.expert_parallel_buffers),
        "optimizer": storage_bytes(kept),
    }


def saved_bytes(path: str, samples: int, length: int, layout: dict[str, Any]) -> int:
    """Storages, other than weights, that a forward keeps for its backward."""
    parallel = ParallelConfig(**layout)
    distributed.initialize(parallel, seed=1)
    loaded = load_model(path, parallel, params_dtype=torch.float32, trainable=True)
    own = {weight.untyped_storage().data_ptr() for weight in loaded.module.parameters()}
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.detach())  # kept, so that no address is used twice
        return tensor

    tokens = torch.randint(0, 500, (samples, length), generator=torch.Generator().manual_seed(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loaded.module(tokens, torch.arange(length).expand(samples, length), None)
    return storage_bytes(tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in own)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
