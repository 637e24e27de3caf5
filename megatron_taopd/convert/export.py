"""The Megatron modules of all ranks back to one HF directory that ``from_pretrained`` loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_taopd.convert.hf_writer import HFWriter
from megatron_taopd.convert.mapping import Rule, named, rules
from megatron_taopd.convert.parameters import parameters_with_rules
from megatron_taopd.errors import ModelError
from megatron_taopd.models.hf_config import HFModelConfig
from megatron_taopd.platform import device, distributed, progress
from megatron_taopd.platform.together import raise_together

if TYPE_CHECKING:
    from megatron_taopd.models.gpt import DistillationGPTModel

Key = tuple[int | None, str]
"""A parameter of the whole model: its layer and its rule's Megatron name."""


def export_hf(
    module: DistillationGPTModel | Sequence[DistillationGPTModel],
    hf: HFModelConfig,
    out_dir: str | Path,
    *,
    source_dir: str | Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write the model as an HF directory. Collective over all ranks; it is complete when this returns.

    Tensors travel to rank 0 one by one, so that it holds one file's worth at most. The directory is
    written aside and renamed at the end: it is there whole or not at all.

    Args:
        module: this rank's stage or its virtual stages, unwrapped (not the DDP wrapper).
        hf: what the module was built from.
        out_dir: directory to create; an earlier model there is replaced.
        source_dir: where tokenizer, chat template and generation config are copied from; default
            ``hf.path``.
        max_shard_bytes: size at which the next weight file is begun.

    Returns:
        ``out_dir``.

    Raises:
        ModelError: ``out_dir`` exists and is no HF directory, or writing failed; the same on every rank.
    """
    out_dir = Path(out_dir)
    modules = [module] if isinstance(module, torch.nn.Module) else list(module)
    writer = HFWriter(out_dir, max_shard_bytes) if distributed.is_rank_zero() else None
    failure = _attempt(writer.begin) if writer else None
    raise_together(failure, ModelError)
    for name, tensor in _whole_tensors(modules, hf):
        progress.beat()
        # After a failure the tensors still have to be received, or their senders would wait for ever.
        if writer is not None and failure is None:
            failure = _attempt(writer.add, name, tensor)
    if writer is not None and failure is None:
        failure = _attempt(writer.finish, hf, Path(source_dir or hf.path))
    raise_together(failure, ModelError)
    return out_dir


def _attempt(step: Callable[..., None], *args: Any) -> str | None:
    try:
        step(*args)
    except (OSError, ModelError) as error:
        return f"cannot export the model: {error}"
    return None


def _whole_tensors(modules: Sequence[DistillationGPTModel], hf: HFModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """On rank 0 every HF tensor in turn, whole, on the CPU; on other ranks nothing, but they take part."""
    mine = _parameters(modules, hf)
    owners = _owners(list(mine))
    dtype = next(modules[0].parameters()).dtype
    for layer, rule in rules(hf):
        key = (layer, rule.megatron)
        owner = owners[key]
        joined = _join(mine, key, rule, hf, owner)
        for index, (template, shape) in enumerate(zip(rule.hf, rule.layout.shapes(hf), strict=True)):
            if distributed.rank() == owner and owner != 0:
                dist.send(joined[index].contiguous(), dst=0)
            if distributed.is_rank_zero():
                if owner == 0:
                    tensor = joined[index].contiguous()
                else:
                    tensor = torch.empty(shape, dtype=dtype, device=device())
                    dist.recv(tensor, src=owner)
                assert tuple(tensor.shape) == shape, (template, tensor.shape, shape)
                yield named(template, layer), tensor.cpu()


def _parameters(modules: Sequence[DistillationGPTModel], hf: HFModelConfig) -> dict[Key, torch.Tensor]:
    return {
        (layer, rule.megatron): parameter.detach()
        for module in modules
        for _, parameter, layer, rule in parameters_with_rules(module, hf)
    }


def _owners(mine: list[Key]) -> dict[Key, int]:
    """For each parameter the first rank that has it: the first of the tensor-parallel ranks that share it."""
    everyone: list[list[Key]] = [mine]
    if distributed.world_size() > 1:
        everyone = [[] for _ in range(distributed.world_size())]
        dist.all_gather_object(everyone, mine)
    owners: dict[Key, int] = {}
    for rank, keys in enumerate(everyone):
        for key in keys:
            owners.setdefault(key, rank)
    return owners


def _join(
    mine: dict[Key, torch.Tensor], key: Key, rule: Rule, hf: HFModelConfig, owner: int
) -> tuple[torch.Tensor, ...]:
    """The HF tensors, on the owner and the ranks that share the parameter with it; elsewhere nothing."""
    group = distributed.expert_tensor_parallel_group() if rule.of_expert else distributed.tensor_parallel_group()
    if key not in mine or dist.get_process_group_ranks(group)[0] != owner:
        return ()
    shards = [torch.empty_like(mine[key]) for _ in range(group.size())]
    dist.all_gather(shards, mine[key].contiguous(), group=group)
    return rule.layout.join(shards, hf)
