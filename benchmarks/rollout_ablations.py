"""Our measures of the rollout, each taken back alone: blocks in which the engine does without one of them.

They change seconds, not tokens: samples are drawn as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

from megatron_taopd.models import sample_cache
from megatron_taopd.models.sample_cache import SampleCache
from megatron_taopd.rollout.megatron import generation, module_state

Ablation = Callable[[], AbstractContextManager[Any]]


def autograd_linears() -> AbstractContextManager[Any]:
    """Linear layers are autograd functions, as in training."""
    return patch.object(module_state, "linear", linear_with_grad_accumulation_and_async_allreduce)


def whole_head() -> AbstractContextManager[Any]:
    """The head's product is one matrix product."""
    return patch.object(generation, "logits_of", torch.nn.functional.linear)


def one_prefill() -> AbstractContextManager[Any]:
    """All prompts are read in one forward, padded to the longest."""
    return patch.object(generation, "prefill_groups", lambda lengths: [slice(0, len(lengths))])


@contextmanager
def cache_rotated_anew() -> Iterator[None]:
    """The cache has keys that are not rotated, and every layer rotates all of them for every token."""
    rotate, append = SampleCache.rotate, SampleCache.append

    def rotate_query(self: Any, query: torch.Tensor, key: torch.Tensor, frequencies: torch.Tensor) -> Any:
        self.frequencies = frequencies
        return rotate(self, query, key[:, :, :0], frequencies)[0], key

    def append_and_rotate(self: Any, layer_number: int, key: torch.Tensor, value: torch.Tensor) -> Any:
        keys, values = append(self, layer_number, key, value)
        first_row, rows = self.batch_size_offset, key.shape[1]
        stop = self.sequence_len_offset + key.shape[0]
        start_B = self.start_B[first_row : first_row + rows]
        positions_SB = (self._slots[stop - keys.shape[0] : stop, None] - start_B).clamp_min(0)
        angles = self.frequencies[positions_SB, 0]
        return sample_cache._rotate(keys, angles.cos().to(keys.dtype), angles.sin().to(keys.dtype)), values

    with patch.object(SampleCache, "rotate", rotate_query), patch.object(SampleCache, "append", append_and_rotate):
        yield


@contextmanager
def ended_go_on() -> Iterator[None]:
    """Samples that have ended stay in the batch until the last one has."""
    sample = generation._Batch.sample

    def sample_on(self: Any, hidden_BH: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        tokens_B, alive_B = sample(self, hidden_BH)
        self.ended_B = ~alive_B | getattr(self, "ended_B", ~alive_B)
        return tokens_B, torch.full_like(alive_B, not bool(self.ended_B.all()))

    with patch.object(generation._Batch, "sample", sample_on):
        yield


ABLATIONS: dict[str, dict[str, Ablation]] = {
    "full length": {
        "linear layers as autograd functions": autograd_linears,
        "the head's product in one": whole_head,
        "the whole cache rotated for each token": cache_rotated_anew,
        "prompts read in one padded forward": one_prefill,
    },
    "early stops": {"ended samples go on": ended_go_on},
}
"""By the case of bench_rollout.py that they matter to."""
