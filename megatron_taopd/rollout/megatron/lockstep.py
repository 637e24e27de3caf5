"""Forwards of replicas that share experts.

A mixture's tokens travel to the ranks that hold their experts, in every layer of every forward. So replicas that
share experts, which answer prompts of their own otherwise, must run equally many forwards; how many tokens each reads
in one does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer import TransformerConfig

from megatron_taopd.models import DistillationGPTModel
from megatron_taopd.models.sample_cache import SampleCache
from megatron_taopd.platform import device
from megatron_taopd.rollout.megatron.wrapper import wrap_model


def shares_experts(config: TransformerConfig) -> bool:
    """Whether experts are dealt to ranks in another way than the rest of the model."""
    if config.num_moe_experts is None:
        return False
    return (
        config.expert_model_parallel_size > 1 or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
    )


def announce_forward(config: TransformerConfig) -> None:
    """Before a forward: tell the other replicas that one more is to come."""
    if shares_experts(config):
        _any_busy(True)


def finish_together(modules: Sequence[DistillationGPTModel]) -> None:
    """When this replica has no work left: read one token for nothing as often as another one has a forward to run."""
    if not shares_experts(modules[-1].config):
        return
    tokens_11 = torch.zeros(1, 1, dtype=torch.int64, device=device())
    while _any_busy(False):
        wrapper = wrap_model(modules, SampleCache(tokens_11[0], 1))
        wrapper.forward_tokens(tokens_11, first_row=0, slot=0)


def _any_busy(busy: bool) -> bool:
    # All ranks, because expert groups of one replica's ranks may reach different replicas.
    flag = torch.tensor(int(busy), device=device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)
