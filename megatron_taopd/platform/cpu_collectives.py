"""Collectives of megatron-core that gloo lacks: parts of different sizes, as experts receive them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


def numbers_of_tokens(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Sizes of an all-to-all as numbers; Megatron turns tensors into numbers on their way from CUDA only."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def gather_of_any_sizes(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Megatron's gather along the first dimension; parts of different sizes travel padded to the largest."""

    def gather_along_first_dim(
        input_: torch.Tensor,
        group: dist.ProcessGroup,
        output_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        padded = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    return gather_along_first_dim


def reduce_scatter_of_any_sizes(reduce_scatter: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Megatron's reduce-scatter along the first dimension; parts of different sizes are summed everywhere, then cut."""

    def reduce_scatter_along_first_dim(
        input_: torch.Tensor,
        group: dist.ProcessGroup,
        input_split_sizes: Sequence[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        summed = input_.clone()
        dist.all_reduce(summed, group=group)
        return summed.split(list(input_split_sizes))[group.rank()].clone()

    return reduce_scatter_along_first_dim
