"""Conversion of a synthetic model of 2 GB, both ways: seconds, and peak memory as the kernel counts it.

The model has the shapes of Llama 3.2 1B (a vocabulary of 128,256) with the layers that make the size. Each conversion
runs in a process of its own; its peak is ru_maxrss, with the imports in it, and beside it the part above the imports.
The floor is reading the weight file and writing it to another, with the same fsync.

    python benchmarks/bench_convert.py --gigabytes 2
"""

from __future__ import annotations

import argparse
import filecmp
import importlib
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch

HIDDEN, VOCAB, FFN, HEADS, KV_HEADS = 2048, 128_256, 8192, 32, 8


def shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(num_layers):
        name = f"model.layers.{layer}"
        found |= {
            f"{name}.input_layernorm.weight": (HIDDEN,),
            f"{name}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{name}.self_attn.k_proj.weight": (kv, HIDDEN),
            f"{name}.self_attn.v_proj.weight": (kv, HIDDEN),
            f"{name}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{name}.post_attention_layernorm.weight": (HIDDEN,),
            f"{name}.mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{name}.mlp.up_proj.weight": (FFN, HIDDEN),
            f"{name}.mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def write_model(path: Path, gigabytes: float) -> None:
    """An HF directory of bf16 noise in one file."""
    from megatron_taopd.convert.safetensors_files import Entry, write_header, write_values

    def entries(num_layers: int) -> list[Entry]:
        return [Entry(name, shape, torch.bfloat16) for name, shape in shapes(num_layers).items()]

    layers = 1
    while sum(entry.num_bytes for entry in entries(layers)) < gigabytes * 1e9:
        layers += 1
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": FFN,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "dtype": "bfloat16",
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    noise = torch.randn(10_000_019, generator=torch.Generator().manual_seed(0)).bfloat16()
    with open(path / "model.safetensors", "wb") as stream:
        write_header(stream, entries(layers))
        for entry in entries(layers):
            left = torch.Size(entry.shape).numel()
            while left:
                write_values(stream, noise[:left])
                left -= min(left, noise.numel())


def to_megatron(source: str, out: str) -> None:
    from megatron_taopd.convert.to_megatron import convert_to_megatron

    convert_to_megatron(source, out)


def to_hf(source: str, out: str) -> None:
    from megatron_taopd.convert.to_hf import convert_to_hf

    convert_to_hf(source, out)


def copy(source: str, out: str) -> None:
    Path(out).mkdir()
    with open(Path(source) / "model.safetensors", "rb") as reader, open(Path(out) / "copy", "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 24)
        os.fsync(writer.fileno())


def measure(action: Callable[[str, str], None], source: str, out: str) -> dict[str, Any]:
    """Runs in a fresh process."""
    for module in ("to_megatron", "to_hf"):  # the memory of the imports is not the conversion's
        importlib.import_module(f"megatron_taopd.convert.{module}")

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    torch.set_num_threads(1)
    imports = peak()
    wall, cpu = time.perf_counter(), time.process_time()
    action(source, out)
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak_gb": peak(),
        "above_imports_gb": peak() - imports,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the model at least")
    parser.add_argument("--dir", type=Path, default=None, help="where there is room for four times that")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for the table")
    args = parser.parse_args()
    args.threads = 1
    common.start(args)
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        root = Path(name)
        write_model(root / "hf", args.gigabytes)
        size = (root / "hf" / "model.safetensors").stat().st_size / 1e9
        rows = []
        for title, action, source, out in (
            ("copy of the file", copy, "hf", "copy"),
            ("hf-to-megatron", to_megatron, "hf", "megatron"),
            ("megatron-to-hf", to_hf, "megatron", "back"),
        ):
            row = common.in_fresh_process(measure, action, str(root / source), str(root / out))
            rows.append({"what": title, "size_gb": size, "rate": size * 1e3 / row["wall"], **row})
        same = filecmp.cmp(root / "hf" / "model.safetensors", root / "back" / "model.safetensors", shallow=False)
    for row in rows:
        row |= {key: f"{row[key]:.2f}" for key in ("size_gb", "peak_gb", "above_imports_gb")}
        row |= {key: f"{row[key]:.1f}" for key in ("wall", "cpu")} | {"rate": f"{row['rate']:.0f}"}
    table = common.Table(
        name="convert",
        title="Conversion, one process, one thread",
        columns={
            "what": "what",
            "size_gb": "model, GB",
            "wall": "wall, s",
            "cpu": "CPU, s",
            "rate": "MB/s",
            "peak_gb": "peak memory, GB",
            "above_imports_gb": "above the imports, GB",
        },
        rows=rows,
        notes=[f"There and back, the weight file is {'the same, byte for byte' if same else 'ANOTHER ONE'}."],
    )
    common.finish([table], args)


if __name__ == "__main__":
    main()
