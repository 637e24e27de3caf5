"""Peak memory of a conversion is that of a few tensors, measured by the kernel in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_taopd.convert.safetensors_files import Entry, write_header, write_values

HIDDEN, LAYERS, VOCAB, FFN, HEADS, KV_HEADS = 1024, 8, 32000, 3072, 16, 8
MEASURE = """
import resource, sys
from megatron_taopd.convert.to_hf import convert_to_hf
from megatron_taopd.convert.to_megatron import convert_to_megatron

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak()
action, source, out = sys.argv[1:]
{"to_megatron": convert_to_megatron, "to_hf": convert_to_hf}[action](source, out)
print(before, peak())
"""


def _entries() -> list[Entry]:
    head_dim = HIDDEN // HEADS
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (HIDDEN,),
            f"{name}.self_attn.q_proj.weight": (HEADS * head_dim, HIDDEN),
            f"{name}.self_attn.k_proj.weight": (KV_HEADS * head_dim, HIDDEN),
            f"{name}.self_attn.v_proj.weight": (KV_HEADS * head_dim, HIDDEN),
            f"{name}.self_attn.o_proj.weight": (HIDDEN, HEADS * head_dim),
            f"{name}.post_attention_layernorm.weight": (HIDDEN,),
            f"{name}.mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{name}.mlp.up_proj.weight": (FFN, HIDDEN),
            f"{name}.mlp.down_proj.weight": (HIDDEN, FFN),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return [Entry(name, shape, torch.bfloat16) for name, shape in shapes.items()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "model"
    path.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": FFN,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).bfloat16()
    with open(path / "model.safetensors", "wb") as stream:
        write_header(stream, _entries())
        for entry in _entries():
            count = torch.Size(entry.shape).numel()
            write_values(stream, noise.repeat(-(-count // noise.numel()))[:count])
    return path


def _growth(action: str, source: Path, out: Path) -> float:
    """MB by which the peak rises above that of the imports."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, action, str(source), str(out)],
        capture_output=True,
        text=True,
        check=True,
    )
    before, peak = map(float, run.stdout.split())
    return peak - before


def test_both_ways(model: Path, tmp_path: Path) -> None:
    megabytes = (model / "model.safetensors").stat().st_size / 2**20
    assert megabytes > 300
    largest = max(entry.num_bytes for entry in _entries()) / 2**20
    assert largest > 60
    there = _growth("to_megatron", model, tmp_path / "megatron")
    back = _growth("to_hf", tmp_path / "megatron", tmp_path / "hf")
    assert there < 120 and back < 120, (there, back)
    # Not vacuous: the model passed through.
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size / 2**20 > 300
    print(f"{megabytes:.0f} MB: +{there:.0f} MB there, +{back:.0f} MB back")
