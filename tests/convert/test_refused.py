"""What cannot be converted: the error names tensor and file, and nothing appears under the output's name."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_taopd.convert.to_hf import convert_to_hf
from megatron_taopd.convert.to_megatron import convert_to_megatron
from megatron_taopd.errors import CheckpointError, ModelError
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.convert.models import assert_same_bytes, tensors

UP = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_hf_model(tmp_path_factory.mktemp("hf") / "model", "llama", num_layers=2, tied=True)


@pytest.fixture(scope="module")
def checkpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_to_megatron(model, tmp_path_factory.mktemp("megatron") / "model", max_shard_bytes=100_000)


def _edit(path: Path, change: Callable[[Tensors], object]) -> None:
    found = load_file(path / "model.safetensors")
    change(found)
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})


def _edit_config(path: Path, **settings: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def _split(path: Path) -> Path:
    found = tensors(path)
    (path / "model.safetensors").unlink()
    weight_map = {}
    for number in range(2):
        part = {name: value for name, value in found.items() if ("layers.1" in name) == bool(number)}
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path / "model-00002-of-00002.safetensors"


def _truncate(path: Path) -> None:
    file = _split(path)
    file.write_bytes(file.read_bytes()[:-10])


def _truncate_header(path: Path) -> None:
    file = _split(path)
    file.write_bytes(file.read_bytes()[:100])


def _lose_shard(path: Path) -> None:
    _split(path).unlink()


def _wrong_shard(path: Path) -> None:
    file = _split(path)
    shutil.copyfile(path / "model-00001-of-00002.safetensors", file)


def _not_in_index(path: Path) -> None:
    file = _split(path)
    save_file(load_file(file) | {"model.surplus": torch.ones(2)}, file, metadata={"format": "pt"})


HF_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: _edit(p, lambda t: t.pop(UP)), f"no tensor '{UP}'"),
    "shape": (
        lambda p: _edit(p, lambda t: t.update({UP: t[UP][:, :-1].contiguous()})),
        rf"model.safetensors: '{UP}' has shape \[96, 63\], but config.json implies \[96, 64\]",
    ),
    "extra": (
        lambda p: _edit(p, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[UP].clone()})),
        r"model.safetensors: no place for tensor 'model.layers.2.mlp.up_proj.weight'",
    ),
    "bias": (
        lambda p: _edit(p, lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(64)})),
        "no place for tensor 'model.layers.1.self_attn.q_proj.bias'",
    ),
    "untied head": (
        lambda p: _edit(p, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "no place for tensor 'lm_head.weight' .*tie_word_embeddings",
    ),
    "integers": (lambda p: _edit(p, lambda t: t.update({UP: t[UP].to(torch.int8)})), f"'{UP}' is stored as I8"),
    "nan": (lambda p: _edit(p, lambda t: t[UP][-1].fill_(float("nan"))), f"not finite: {UP}"),
    "zero": (lambda p: _edit(p, lambda t: t[UP].zero_()), f"all zero: {UP}"),
    "mixed types": (
        lambda p: _edit(p, lambda t: t.update({UP: t[UP].bfloat16()})),
        rf"different types \(model.layers.1.mlp.gate_proj.weight torch.float32, {UP} torch.bfloat16\); give --dtype",
    ),
    "truncated": (_truncate, "model-00002-of-00002.safetensors cannot be read, it may be truncated: it has"),
    "truncated header": (_truncate_header, "model-00002-of-00002.safetensors cannot be read, it may be truncated"),
    "lost shard": (_lose_shard, "model-00002-of-00002.safetensors is missing"),
    "wrong shard": (_wrong_shard, "model-00002-of-00002.safetensors should hold 'model.layers.1"),
    "not in index": (_not_in_index, "model-00002-of-00002.safetensors holds 'model.surplus'"),
    "architecture": (
        lambda p: _edit_config(p, architectures=["GPT2LMHeadModel"]),
        "'GPT2LMHeadModel' is not supported; supported: Qwen3ForCausalLM",
    ),
    "heads": (lambda p: _edit_config(p, num_key_value_heads=1), r"k_proj.weight' has shape \[32, 64\]"),
}


@pytest.mark.parametrize("damage", HF_DAMAGE)
def test_hf_directory(model, tmp_path, damage) -> None:
    change, message = HF_DAMAGE[damage]
    broken = shutil.copytree(model, tmp_path / "broken")
    change(broken)
    with pytest.raises(ModelError, match=message):
        convert_to_megatron(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_harmless_surplus_is_passed_over(model, tmp_path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    surplus = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    _edit(copy, lambda t: t.update(surplus | {"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    convert_to_megatron(copy, tmp_path / "megatron")
    assert_same_bytes(model, convert_to_hf(tmp_path / "megatron", tmp_path / "hf"))


def test_types_may_differ_between_layers_when_one_is_named(model, tmp_path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    down = "model.layers.1.mlp.down_proj.weight"
    _edit(copy, lambda t: t.update({down: t[down].double()}))
    with pytest.raises(CheckpointError, match="layers of decoder.layers.mlp.linear_fc2.weight have different types"):
        convert_to_megatron(copy, tmp_path / "megatron")
    convert_to_megatron(copy, tmp_path / "megatron", dtype=torch.float32)
    assert_same_bytes(model, convert_to_hf(tmp_path / "megatron", tmp_path / "hf"))


def _edit_index(checkpoint: Path, change: Callable[[dict], object]) -> None:
    file = checkpoint / "release" / ".metadata"
    index = pickle.loads(file.read_bytes())
    change(index.state_dict_metadata)
    file.write_bytes(pickle.dumps(index))


def _overwrite(checkpoint: Path) -> None:
    file = checkpoint / "release" / "__0_1.distcp"
    content = bytearray(file.read_bytes())
    content[300:20_000] = bytes(19_700)
    file.write_bytes(content)


def _cut(checkpoint: Path) -> None:
    file = checkpoint / "release" / "__0_1.distcp"
    file.write_bytes(file.read_bytes()[:-10])


FC2 = "decoder.layers.mlp.linear_fc2.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda p: _edit_index(p, lambda index: index.pop(FC2)),
        rf"no tensor {FC2}, which model.layers.0.mlp.down_proj.weight",
    ),
    "extra": (
        lambda p: _edit_index(p, lambda index: index.update({"decoder.layers.mlp.linear_fc2.bias": index[FC2]})),
        "no place for decoder.layers.mlp.linear_fc2.bias",
    ),
    "shape": (
        lambda p: _edit_config(p / "release" / "hf", num_hidden_layers=3),
        r"has shape \[2, 64\], but the configuration in .* implies \[3, 64\]",
    ),
    "vocabulary": (
        lambda p: _edit_config(p / "release" / "hf", vocab_size=600),
        "has 512 rows, but .* has a vocabulary of 600",
    ),
    "lost file": (lambda p: (p / "release" / "__0_1.distcp").unlink(), "no __0_1.distcp"),
    "cut file": (_cut, "torn: __0_1.distcp has"),
    "bytes": (_overwrite, "cannot be read from __0_1.distcp"),
    "hole": (lambda p: _edit_index(p, lambda index: index[FC2].chunks.pop()), f"has 0 of .* values of {FC2}"),
    "no configuration": (lambda p: shutil.rmtree(p / "release" / "hf"), "has no hf/config.json"),
    "tracker": (lambda p: (p / "latest_checkpointed_iteration.txt").write_text("twelve"), "'twelve' instead of"),
    "iteration": (lambda p: (p / "latest_checkpointed_iteration.txt").write_text("12"), "has no iter_0000012"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_megatron_checkpoint(checkpoint, tmp_path, damage) -> None:
    change, message = DAMAGE[damage]
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    change(broken)
    with pytest.raises(CheckpointError, match=message):
        convert_to_hf(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_configuration_from_elsewhere(model, checkpoint, tmp_path) -> None:
    bare = shutil.copytree(checkpoint, tmp_path / "bare")
    shutil.rmtree(bare / "release" / "hf")
    assert_same_bytes(model, convert_to_hf(bare, tmp_path / "out", hf_source=model))


def test_the_wrong_way_round(model, checkpoint, tmp_path) -> None:
    with pytest.raises(ModelError, match="is a Megatron checkpoint already"):
        convert_to_megatron(checkpoint, tmp_path / "out")
    with pytest.raises(ModelError, match="is no Megatron checkpoint"):
        convert_to_hf(model, tmp_path / "out")
