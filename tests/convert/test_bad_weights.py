"""Weights that are missing, truncated, misshapen or empty: a clear error, the same on every rank."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_taopd.errors import ModelError
from megatron_taopd.models import load_model
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.models import harness

UP = "model.layers.3.mlp.up_proj.weight"


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _zero_value_projection(path: Path) -> None:
    _edit(path, lambda tensors: tensors["model.layers.2.self_attn.v_proj.weight"].zero_())


def _put_nan(path: Path) -> None:
    _edit(path, lambda tensors: tensors[UP][-1].fill_(float("nan")))


def _drop(path: Path) -> None:
    _edit(path, lambda tensors: tensors.pop(UP))


def _reshape(path: Path) -> None:
    _edit(path, lambda tensors: tensors.update({UP: tensors[UP][:, :-1].contiguous()}))


def _integers(path: Path) -> None:
    _edit(path, lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)}))


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _split(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    last = {name: value for name, value in tensors.items() if "layers.3" in name}
    first = {name: value for name, value in tensors.items() if name not in last}
    weight_map = {}
    for number, part in enumerate((first, last), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _lose_a_file(path: Path) -> None:
    _split(path)
    (path / "model-00002-of-00002.safetensors").unlink()


def _all_zero(path: Path) -> None:
    _edit(path, lambda tensors: [tensor.zero_() for tensor in tensors.values()])


def _pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _biases(path: Path) -> None:
    """Of Qwen2 in a file that config.json calls a Llama."""
    _edit(
        path, lambda tensors: tensors.update({f"model.layers.0.self_attn.{n}_proj.bias": torch.ones(64) for n in "qkv"})
    )


def _more_layers(path: Path) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 2}))


def _tie(path: Path) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))


def _tie_to_a_copy(path: Path) -> None:
    _tie(path)
    _edit(path, lambda tensors: tensors["lm_head.weight"].copy_(tensors["model.embed_tokens.weight"]))


CASES = {
    "zero": (_zero_value_projection, "1 tensor.s. are all zero: model.layers.2.self_attn.v_proj.weight"),
    "nan": (_put_nan, "not finite: model.layers.3.mlp.up_proj.weight"),
    "missing tensor": (_drop, "no tensor 'model.layers.3.mlp.up_proj.weight'"),
    "other shape": (_reshape, r"has shape \[96, 63\], but config.json implies \[96, 64\]"),
    "integers": (_integers, "stored as I8"),
    "truncated": (_truncate, "may be truncated"),
    "missing file": (_lose_a_file, "model-00002-of-00002.safetensors is missing"),
    "all zero": (_all_zero, "39 tensor.s. are all zero: lm_head.weight"),
    "biases": (
        _biases,
        "model.safetensors: no place for tensor 'model.layers.0.self_attn.k_proj.bias' in this architecture",
    ),
    "more layers": (_more_layers, "no place for tensor 'model.layers.2.input_layernorm.weight'"),
    "another head": (_tie, "no place for tensor 'lm_head.weight'.* but the head here is another"),
    "pickled": (_pickled, "found pytorch_model.bin; convert to safetensors"),
}


def _errors(paths: dict[str, str], layout: str) -> dict[str, str]:
    parallel = harness.start(layout)
    found = {}
    for name, path in paths.items():
        try:
            load_model(path, parallel, params_dtype=torch.float32, trainable=False)
            found[name] = "loaded"
        except ModelError as error:
            found[name] = str(error)
    return found


def test_every_rank_refuses_with_the_reason(pool, tmp_path):
    healthy = save_tiny_hf_model(tmp_path / "healthy", "qwen2", seed=2)
    _edit(healthy, lambda tensors: tensors["model.layers.0.self_attn.k_proj.bias"].zero_())
    split = Path(shutil.copytree(healthy, tmp_path / "split"))
    _split(split)
    paths = {"healthy": str(healthy), "split": str(split)}
    llama = save_tiny_hf_model(tmp_path / "llama", "llama", seed=2)
    _tie_to_a_copy(Path(shutil.copytree(llama, tmp_path / "tied copy")))
    paths["tied copy"] = str(tmp_path / "tied copy")
    for name, (damage, _) in CASES.items():
        copy = shutil.copytree(llama, tmp_path / name)
        damage(copy)
        paths[name] = str(copy)
    for layout in ("TP1", "TP2-PP2-SP"):
        for errors in pool(4).run(_errors, paths, layout):
            assert {errors.pop(name) for name in ("healthy", "split", "tied copy")} == {"loaded"}  # a bias may be zero
            assert errors.keys() == CASES.keys()
            for name, message in errors.items():
                assert re.search(CASES[name][1], message), (layout, name, message)
