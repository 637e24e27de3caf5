"""Context parallelism and packed sequences against one sequence at a time, values and gradients in float64."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from safetensors.torch import load_file

from megatron_taopd.convert import export_hf
from megatron_taopd.ops.context import context_positions
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.models import harness

LENGTHS = (5, 16, 9)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "CP1": (1, {}),
    "CP2": (2, {"context_parallel_size": 2}),
    "CP2-TP2-SP": (
        4,
        {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "CP2-PP2": (4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "CP4": (4, {"context_parallel_size": 4}),
}
H = 64


def _sequences() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids [L] and a cotangent [L, H] of the hidden states."""
    generator = torch.Generator().manual_seed(8)
    return [
        (
            torch.randint(0, 509, (length,), generator=generator),
            torch.randn(length, H, generator=generator, dtype=torch.float64),
        )
        for length in LENGTHS
    ]


def _pad(part: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([part, part.new_zeros(length - part.shape[0], *part.shape[1:])])


def _batches(kind: str, parallel: ParallelConfig) -> list[tuple[torch.Tensor, torch.Tensor, Any]]:
    """(token ids [B, S], cotangents [S, B, H], packed_seq_params) of this context-parallel rank."""
    sequences = _sequences()
    if kind == "one by one":
        return [(tokens[None], cotangent[:, None], None) for tokens, cotangent in sequences]
    size, rank = parallel.context_parallel_size, distributed.context_parallel_rank()
    multiple = 2 * size * parallel.tensor_model_parallel_size if size > 1 else 1
    lengths = [-(-length // multiple) * multiple for length in LENGTHS]
    if kind == "padded":
        lengths = [max(lengths)] * len(lengths)
    tokens, cotangents = [], []
    for (ids, cotangent), length in zip(sequences, lengths, strict=True):
        own = context_positions(length, rank=rank, size=size)
        tokens.append(_pad(ids, length)[own])
        cotangents.append(_pad(cotangent, length)[own])
    if kind == "padded":
        return [(torch.stack(tokens), torch.stack(cotangents, dim=1), None)]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
    )
    return [(torch.cat(tokens)[None], torch.cat(cotangents)[:, None], packed)]


class _InnerProduct:
    """A forward step whose loss is the inner product of hidden states and cotangents."""

    def __init__(self, *, sequence_parallel: bool) -> None:
        self.sequence_parallel = sequence_parallel
        self.total = torch.zeros((), dtype=torch.float64)
        # The schedule divides by the tokens of all ranks: they are one here.
        self.num_tokens = torch.tensor(int(distributed.context_parallel_rank() == 0), dtype=torch.int)

    def __call__(self, iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        tokens, cotangent, packed = next(iterator)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(tokens, positions, None, packed_seq_params=packed), partial(self.loss, cotangent)

    def loss(self, cotangent: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        loss = (hidden * cotangent).sum()
        self.total += loss.detach()
        return loss, self.num_tokens, {}


def _gradients(path: str, sizes: dict[str, Any], kinds: tuple[str, ...], out: str) -> dict[str, float]:
    """Writes the gradients as if they were weights; returns the losses, of last-stage ranks."""
    parallel = ParallelConfig(**sizes)
    distributed.initialize(parallel, seed=1)
    values = {}
    for kind in kinds:
        loaded = harness.load(path, parallel, trainable=True, params_dtype=torch.float64)
        loaded.config.finalize_model_grads_func = finalize_model_grads
        ddp = DistributedDataParallel(loaded.config, DistributedDataParallelConfig(), loaded.module)
        step = _InnerProduct(sequence_parallel=parallel.sequence_parallel)
        sums = {name: torch.zeros_like(weight) for name, weight in loaded.module.named_parameters()}
        for batch in _batches(kind, parallel):
            ddp.zero_grad_buffer()
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iter([batch]),
                model=ddp,
                num_microbatches=1,
                seq_length=batch[0].shape[1] * parallel.context_parallel_size,
                micro_batch_size=batch[0].shape[0],
                forward_only=False,
            )
            for name, weight in loaded.module.named_parameters():
                sums[name] += weight.main_grad
        for name, weight in loaded.module.named_parameters():
            weight.data.copy_(sums[name])
        export_hf(loaded.module, loaded.hf, f"{out}/{kind}")
        torch.distributed.all_reduce(step.total, group=distributed.context_parallel_group())
        if distributed.is_last_stage():
            values[kind] = float(step.total)
    return values


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_hf_model(tmp_path_factory.mktemp("context") / "qwen3", "qwen3", num_layers=2, seed=3)


@pytest.fixture(scope="module")
def expected(pool, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("one_by_one")
    (values,) = pool(1).run(_gradients, str(model), {}, ("one by one",), str(out))
    return values["one by one"], load_file(out / "one by one" / "model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_and_gradient(pool, model: Path, expected, tmp_path: Path, layout: str) -> None:
    ranks, sizes = LAYOUTS[layout]
    kinds = ("padded", "packed")
    wanted, gradients = expected
    for values in pool(ranks).run(_gradients, str(model), sizes, kinds, str(tmp_path)):
        for value in values.values():
            assert value == pytest.approx(wanted, rel=1e-12)
    for kind in kinds:
        found = load_file(tmp_path / kind / "model.safetensors")
        for name, gradient in gradients.items():
            assert found[name].dtype == torch.float64
            assert (found[name] - gradient).abs().max() <= 1e-10 * gradient.abs().max(), (layout, kind, name)


def test_positions() -> None:
    held = [context_positions(12, rank=rank, size=3).tolist() for rank in range(3)]
    assert held == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert context_positions(3, rank=0, size=1).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="10 tokens cannot be cut into 4 chunks"):
        context_positions(10, rank=0, size=2)
