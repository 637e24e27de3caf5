"""Peak memory of a conversion is that of a few tensors, measured by the kernel in a process of its own."""

from __future__ import annotations

import json
import shutil
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
source, megatron, hf = sys.argv[1:]
convert_to_megatron(source, megatron)
there = peak()
convert_to_hf(megatron, hf)
print(before, there, peak())
"""


# 64 experts in each of 2 layers beside little else: 197 MB in tensors of less than a megabyte.
EXPERTS, EXPERT_FFN, EXPERT_HIDDEN, EXPERT_LAYERS, EXPERT_VOCAB = 64, 512, 512, 2, 1024


def _entries(family: str) -> list[Entry]:
    moe = family == "qwen3_moe"
    hidden, layers, vocab = (EXPERT_HIDDEN, EXPERT_LAYERS, EXPERT_VOCAB) if moe else (HIDDEN, LAYERS, VOCAB)
    head_dim = hidden // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.input_layernorm.weight": (hidden,),
            f"{name}.self_attn.q_proj.weight": (HEADS * head_dim, hidden),
            f"{name}.self_attn.k_proj.weight": (KV_HEADS * head_dim, hidden),
            f"{name}.self_attn.v_proj.weight": (KV_HEADS * head_dim, hidden),
            f"{name}.self_attn.o_proj.weight": (hidden, HEADS * head_dim),
            f"{name}.post_attention_layernorm.weight": (hidden,),
        }
        if moe:
            shapes |= {f"{name}.self_attn.{part}_norm.weight": (head_dim,) for part in "qk"}
            shapes |= {f"{name}.mlp.gate.weight": (EXPERTS, hidden)}
        ffn = EXPERT_FFN if moe else FFN
        for part in [f"experts.{expert}." for expert in range(EXPERTS)] if moe else [""]:
            shapes |= {
                f"{name}.mlp.{part}gate_proj.weight": (ffn, hidden),
                f"{name}.mlp.{part}up_proj.weight": (ffn, hidden),
                f"{name}.mlp.{part}down_proj.weight": (hidden, ffn),
            }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return [Entry(name, shape, torch.bfloat16) for name, shape in shapes.items()]


def _save(path: Path, family: str) -> Path:
    path.mkdir()
    moe = family == "qwen3_moe"
    config = {
        "architectures": ["Qwen3MoeForCausalLM" if moe else "LlamaForCausalLM"],
        "hidden_size": EXPERT_HIDDEN if moe else HIDDEN,
        "num_hidden_layers": EXPERT_LAYERS if moe else LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": FFN,
        "vocab_size": EXPERT_VOCAB if moe else VOCAB,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "dtype": "bfloat16",
    }
    if moe:
        config |= {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": EXPERT_FFN}
    (path / "config.json").write_text(json.dumps(config))
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).bfloat16()
    with open(path / "model.safetensors", "wb") as stream:
        write_header(stream, _entries(family))
        for entry in _entries(family):
            count = torch.Size(entry.shape).numel()
            write_values(stream, noise.repeat(-(-count // noise.numel()))[:count])
    return path


def _growth(*paths: Path) -> tuple[float, float]:
    """MB by which the peak rises above that of the imports: on the way to Megatron, and until the way back ends."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
    )
    before, there, back = map(float, run.stdout.split())
    return there - before, back - before


# Size of the file and of its largest tensor at least, growth at most, in MB: a few of the largest blocks.
@pytest.mark.parametrize(("family", "size", "largest", "limit"), [("llama", 300, 60, 120), ("qwen3_moe", 190, 0, 60)])
def test_both_ways(tmp_path: Path, family: str, size: int, largest: int, limit: int) -> None:
    model = _save(tmp_path / "model", family)
    megabytes = (model / "model.safetensors").stat().st_size / 2**20
    assert megabytes > size
    assert max(entry.num_bytes for entry in _entries(family)) / 2**20 > largest
    there, back = _growth(model, tmp_path / "megatron", tmp_path / "hf")
    assert there < limit and back < limit, (there, back)
    # Not vacuous: the model passed through.
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size / 2**20 > size
    print(f"{megabytes:.0f} MB: +{there:.0f} MB there, +{back:.0f} MB back")
    for path in (model, tmp_path / "megatron", tmp_path / "hf"):
        shutil.rmtree(path)
