"""Our attention and norm against plain formulas, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_taopd.errors import ConfigError
from megatron_taopd.models.gpt import scale_frequencies
from megatron_taopd.models.layers import CoreAttention, RMSNorm


def _attention(attention_dropout: float = 0.0) -> CoreAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=24,
        num_attention_heads=4,
        attention_dropout=attention_dropout,
        cuda_graph_scope=[],
    )
    return CoreAttention(config, 1, AttnMaskType.causal, "self")


def _naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[S_q, B, A, D], [S_k, B, G, D] twice -> [S_q, B, A*D]: query i sees keys up to i + S_k - S_q."""
    (length_q, batch, heads, size), (length_k, _, groups, _) = query.shape, key.shape
    out = torch.zeros(length_q, batch, heads, size, dtype=query.dtype)
    for i in range(length_q):
        visible = i + length_k - length_q + 1
        for head in range(heads):
            group = head // (heads // groups)
            scores = torch.einsum("bd,kbd->bk", query[i, :, head], key[:visible, :, group]) / math.sqrt(size)
            out[i, :, head] = torch.einsum("bk,kbd->bd", scores.softmax(-1), value[:visible, :, group])
    return out.flatten(2)


@pytest.mark.parametrize(
    ("length_q", "length_k"), [(7, 7), (1, 1), (1, 7), (3, 7), (2, 3)], ids=lambda length: str(length)
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_value_and_gradient(length_q: int, length_k: int, groups: int):
    generator = torch.Generator().manual_seed(length_q * 100 + length_k * 10 + groups)

    def draw(length: int, heads: int) -> torch.Tensor:
        return torch.randn(length, 3, heads, 6, generator=generator, dtype=torch.float64, requires_grad=True)

    inputs = draw(length_q, 4), draw(length_k, groups), draw(length_k, groups)
    cotangent = torch.randn(length_q, 3, 24, generator=generator, dtype=torch.float64)
    # Whatever Megatron says about masks, the lengths decide.
    found = _attention()(*inputs, attention_mask=None, attn_mask_type=AttnMaskType.no_mask)
    expected = _naive(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, cotangent),
        torch.autograd.grad(expected, inputs, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_attention_refuses_dropout():
    with pytest.raises(ConfigError, match="attention_dropout"):
        _attention(attention_dropout=0.1)


def test_norm_value_and_gradient():
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, params_dtype=torch.float64, cuda_graph_scope=[],
        use_cpu_initialization=True,
    )  # fmt: skip
    norm = RMSNorm(config, 8, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1, 9, dtype=torch.float64))
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    expected = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(hidden), expected)
    inputs = (hidden, norm.weight)
    for ours, theirs in zip(
        torch.autograd.grad(norm(hidden).cos().sum(), inputs),
        torch.autograd.grad(expected.cos().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_frequencies_are_those_of_transformers(scaling: dict):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters=scaling | {"rope_theta": 10000.0},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    assert factor == 1.0
    plain = 1.0 / 10000.0 ** (torch.arange(0, 32, 2, dtype=torch.float32) / 32)
    found = scale_frequencies(plain, scaling)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, plain)
