"""Tiny models of every family, two layers each, and what is in their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_taopd.testing.tiny_models import save_tiny_hf_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": dict(family="qwen2"),
    "qwen2_tied": dict(family="qwen2", tied=True),
    "qwen3": dict(family="qwen3", tied=True, head_dim=32),
    "llama2": dict(family="llama", num_kv_heads=4, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "llama3": dict(family="llama", rope_scaling=LLAMA3),
    "mistral": dict(family="mistral", head_dim=24),
    "qwen3_moe": dict(family="qwen3_moe", head_dim=24),
    "qwen3_moe_mixed": dict(family="qwen3_moe", dense_layers=(0,)),
}
BF16 = ("qwen3", "llama3", "qwen3_moe")
"""Stored in bf16; the others in fp32."""


def save_models(root: Path) -> dict[str, Path]:
    """Write all of them."""
    paths = {}
    for number, (name, settings) in enumerate(MODELS.items()):
        paths[name] = save_tiny_hf_model(root / name, num_layers=2, seed=number, **settings)
        if name in BF16:
            file = paths[name] / "model.safetensors"
            tensors = {key: value.bfloat16() for key, value in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
    return paths


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Everything in the weight files of an HF directory."""
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same_bytes(before: Path, after: Path) -> None:
    """The same tensors, of the same types, bit for bit."""
    expected, found = tensors(before), tensors(after)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.dtype == found[name].dtype, name
        assert torch.equal(value.view(torch.uint8), found[name].view(torch.uint8)), name
