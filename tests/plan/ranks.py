"""Runs in the ranks: the bytes that a trained model really holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from megatron_taopd import cli
from megatron_taopd.commands.train import prepare_training
from megatron_taopd.config import TrainConfig
from megatron_taopd.models import load_model
from megatron_taopd.models.sample_cache import SampleCache
from megatron_taopd.ops import HeadShard
from megatron_taopd.ops.fp8 import Fp8Head
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.training.offload import HeldRows
from megatron_taopd.training.stopping import Stopping
from megatron_taopd.training.teachers import Teacher
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


def saved_bytes(
    path: str, samples: int, length: int, layout: dict[str, Any], recompute: dict[str, Any] | None = None
) -> int:
    """Storages, other than weights, that a forward keeps for its backward, and the most that a piece redone adds."""
    parallel = ParallelConfig(**layout)
    distributed.initialize(parallel, seed=1)
    loaded = load_model(path, parallel, params_dtype=torch.float32, trainable=True, overrides=recompute)
    own = {weight.untyped_storage().data_ptr() for weight in loaded.module.parameters()}
    # Kept, so that no address is used twice. A piece is saved in one go, before any of it is read.
    pieces: list[list[torch.Tensor]] = [[]]
    read = False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal read
        if read:
            pieces.append([])
            read = False
        pieces[-1].append(tensor.detach())
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal read
        read = True
        return tensor

    tokens = torch.randint(0, 500, (samples, length), generator=torch.Generator().manual_seed(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        hidden = loaded.module(tokens, torch.arange(length).expand(samples, length), None)
        hidden.sum().backward()
    first, *recomputed = [[t for t in piece if t.untyped_storage().data_ptr() not in own] for piece in pieces]
    return max(storage_bytes(first + piece) for piece in [[], *recomputed])


def step_bytes(flags: list[str]) -> dict[str, int]:
    """What a training step of ``taopd train`` really makes, by the names of the plan."""
    config = cli.parse(TrainConfig, [*flags, "--train-iters=1", "--lr=1e-3"], name="train")
    distributed.initialize(config.parallel, seed=config.seed)
    found = {"kv_cache": 0, "teacher_hidden": 0, "head_gradient": 0, "fp8_heads": 0}
    expand, read, add = SampleCache.expand, Teacher.read, HeadShard.add_weight_gradient

    def expanded(cache: SampleCache, *args: Any) -> None:
        expand(cache, *args)
        found["kv_cache"] = storage_bytes(part for pair in cache.key_value_memory_dict.values() for part in pair)

    def have_read(teacher: Teacher, *args: Any, **options: Any) -> list[HeldRows]:
        rows = read(teacher, *args, **options)
        found["teacher_hidden"] = storage_bytes(held.read() for held in rows)
        return rows

    def added(head: HeadShard, total_VH: torch.Tensor, *args: Any) -> None:
        found["head_gradient"] = storage_bytes([total_VH])
        add(head, total_VH, *args)

    with pytest.MonkeyPatch.context() as patch, Stopping(config.checkpoint) as stopping:
        patch.setattr(SampleCache, "expand", expanded)
        patch.setattr(Teacher, "read", have_read)
        patch.setattr(HeadShard, "add_weight_gradient", added)
        trainer = prepare_training(config, further_hooks=[], stopping=stopping)
        heads = trainer.pair._fp8_heads
        patch.setattr(
            type(trainer.pair), "student_has_changed", lambda _: found.update(fp8_heads=fp8_bytes(heads.values()))
        )
        trainer.step()
    (teacher,) = trainer.pair.teachers
    weights = [weight for module in teacher.model.modules for weight in module.parameters()]
    weights += [] if teacher.head_weight is None else [teacher.head_weight]
    return {"stage": distributed.pipeline_parallel_rank(), "teacher": storage_bytes(weights), **found}


def fp8_bytes(heads: Iterable[Fp8Head]) -> int:
    """Beside the exact weights."""
    return storage_bytes(part for head in heads for part in (head.numbers, head.scale_V))


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
