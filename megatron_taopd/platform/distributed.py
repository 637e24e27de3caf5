"""Process groups: started from torchrun's environment or alone, laid out by Megatron's ``parallel_state``."""

from __future__ import annotations

import gc
import os
import random
import types
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy
import torch
import torch.distributed as dist

from megatron_taopd.platform import backend, device, enable, has_cuda
from megatron_taopd.platform.layout import ParallelConfig

if TYPE_CHECKING:
    from megatron_taopd.platform.layouts import SecondLayout

_started_here = False
second_layouts: list[SecondLayout] = []
"""Closed together with the first one."""


def _parallel_state() -> types.ModuleType:
    # Imported at first use: this module is imported for its names by rooms that never start Megatron.
    enable()
    from megatron.core import parallel_state

    return parallel_state


def initialize(config: ParallelConfig, *, seed: int) -> None:
    """Start ``torch.distributed`` if nobody has, lay out the model-parallel groups and seed every generator.

    A second call lays the groups out anew over the same processes. Pipeline stages get seeds 100 apart, as in
    Megatron's own training script; data-parallel replicas share theirs.

    Raises:
        ConfigError: the number of ranks is not a multiple of TP x PP x CP, or of ETP x EP x PP.
    """
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    if not dist.is_initialized():
        _start_process_group(timeout)
    check_world_size(config)
    _leave_model_parallel_groups()
    lay_out(config)
    seed_all(seed)


def check_world_size(config: ParallelConfig) -> None:
    """Refuse a layout that does not divide the ranks.

    Raises:
        ConfigError: as :func:`initialize`.
    """
    config.check_world_size(dist.get_world_size())


def lay_out(config: ParallelConfig) -> None:
    """Make the groups of a layout, where none is in force."""
    _parallel_state().initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.num_virtual_stages_per_pipeline_rank,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
    )


def _start_process_group(timeout: timedelta) -> None:
    global _started_here
    _started_here = True
    if has_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend(), timeout=timeout)
    else:
        dist.init_process_group(backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _leave_model_parallel_groups() -> None:
    """Forget the layout and close its groups. Megatron only forgets them, and each gloo group keeps a thread."""
    state = _parallel_state()
    if not state.model_parallel_is_initialized():
        return
    while second_layouts:
        close_groups(second_layouts.pop().groups())
    close_groups(state._global_process_group_list)
    state.destroy_model_parallel()
    _release_wrapped_models()
    gc.collect()  # modules of the last layout hold groups in reference cycles


def _release_wrapped_models() -> None:
    """Empty Megatron's DDP around models of the layout that is left, so that these and their groups are freed.

    The hook on a parameter's gradient holds DDP and the parameter. DDP holds the hook's node; so does, through the
    graph of a view, the shard that the distributed optimizer hangs on the parameter. These circles lead through C++,
    where the garbage collector does not see them.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding.forward.cache_clear()  # its keys hold modules and context-parallel groups
    for candidate in gc.get_objects():
        # one that was emptied before, and is still held by somebody, has nothing left
        if type(candidate) is DistributedDataParallel and "module" in vars(candidate).get("_modules", ()):
            for parameter in candidate.parameters():
                vars(parameter).clear()
            vars(candidate).clear()


def close_groups(groups: Sequence[dist.ProcessGroup | None] | None) -> None:
    """Close the groups of a layout that this rank belongs to."""
    for group in groups or ():
        if group is not None:  # None stands for all ranks, whose group stays
            dist.destroy_process_group(group)


def seed_all(seed: int) -> None:
    """Seed Python, NumPy, torch and Megatron's tracker. ``seed`` must be the same on all ranks."""
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * _parallel_state().get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    numpy.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


def shutdown() -> None:
    """Leave the model-parallel groups, and ``torch.distributed`` where :func:`initialize` started it."""
    global _started_here
    _leave_model_parallel_groups()
    if _started_here and dist.is_initialized():
        dist.destroy_process_group()
    _started_here = False


def rank() -> int:
    """Rank of this process among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Whether this process is the first of all."""
    return rank() == 0


def tensor_parallel_group() -> dist.ProcessGroup:
    """Ranks that share this rank's layers and vocabulary."""
    return _parallel_state().get_tensor_model_parallel_group()


def tensor_parallel_rank() -> int:
    """Index of this rank's shard."""
    return _parallel_state().get_tensor_model_parallel_rank()


def tensor_parallel_size() -> int:
    """Number of shards of a layer."""
    return _parallel_state().get_tensor_model_parallel_world_size()


def context_parallel_group() -> dist.ProcessGroup:
    """Ranks that share this rank's sequences."""
    return _parallel_state().get_context_parallel_group()


def context_parallel_rank() -> int:
    """Index of this rank's part of a sequence."""
    return _parallel_state().get_context_parallel_rank()


def context_parallel_size() -> int:
    """Number of parts of a sequence."""
    return _parallel_state().get_context_parallel_world_size()


def expert_parallel_group() -> dist.ProcessGroup:
    """Ranks among which the experts of this rank's layers are dealt."""
    return _parallel_state().get_expert_model_parallel_group()


def expert_parallel_rank() -> int:
    """Index of this rank's share of the experts."""
    return _parallel_state().get_expert_model_parallel_rank()


def expert_parallel_size() -> int:
    """Number of shares of the experts."""
    return _parallel_state().get_expert_model_parallel_world_size()


def expert_tensor_parallel_group() -> dist.ProcessGroup:
    """Ranks that share each of this rank's experts."""
    return _parallel_state().get_expert_tensor_parallel_group()


def expert_tensor_parallel_rank() -> int:
    """Index of this rank's shard of its experts."""
    return _parallel_state().get_expert_tensor_parallel_rank()


def expert_tensor_parallel_size() -> int:
    """Number of shards of an expert."""
    return _parallel_state().get_expert_tensor_parallel_world_size()


def pipeline_parallel_group() -> dist.ProcessGroup:
    """Stages of this rank's pipeline."""
    return _parallel_state().get_pipeline_model_parallel_group()


def pipeline_parallel_rank() -> int:
    """Index of this rank's stage."""
    return _parallel_state().get_pipeline_model_parallel_rank()


def pipeline_parallel_size() -> int:
    """Number of stages."""
    return _parallel_state().get_pipeline_model_parallel_world_size()


def data_parallel_group() -> dist.ProcessGroup:
    """Ranks that hold the same weights as this one."""
    return _parallel_state().get_data_parallel_group()


def row_group() -> dist.ProcessGroup:
    """Ranks that predict different tokens of the batch: data times context parallel."""
    return _parallel_state().get_data_parallel_group(with_context_parallel=True)


def data_parallel_rank() -> int:
    """Index of this rank's replica."""
    return _parallel_state().get_data_parallel_rank()


def data_parallel_size() -> int:
    """Number of replicas."""
    return _parallel_state().get_data_parallel_world_size()


def most_of_replicas(count: int) -> int:
    """The largest of the replicas' numbers; they call it together."""
    numbers = torch.tensor([count], device=device())
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=data_parallel_group())
    return int(numbers)


def model_parallel_group() -> dist.ProcessGroup:
    """Ranks that together hold one replica: tensor times pipeline parallel."""
    return _parallel_state().get_model_parallel_group()


def is_first_stage(vp_stage: int | None = None) -> bool:
    """Whether this rank, or one of its virtual stages, embeds the tokens."""
    return _parallel_state().is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)


def is_last_stage(vp_stage: int | None = None) -> bool:
    """Whether this rank, or one of its virtual stages, ends in hidden states and holds an LM head."""
    return _parallel_state().is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)


def tell_from_last_stage(value: Any) -> Any:
    """The value of this pipeline's last stage, on all its stages; they call it together."""
    box = [value]
    dist.broadcast_object_list(box, src=last_stage_rank(), group=pipeline_parallel_group())
    return box[0]


def last_stage_rank() -> int:
    """Global rank of the last stage of this rank's pipeline, the source of its broadcasts."""
    return _parallel_state().get_pipeline_model_parallel_last_rank()
