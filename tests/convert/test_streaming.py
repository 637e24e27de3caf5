"""Conversion in one process: the same bytes come back, and Megatron reads what is written at every layout."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

from megatron_taopd.checkpoint import hf_files_dir, read_latest_iteration, save_checkpoint
from megatron_taopd.convert import to_megatron
from megatron_taopd.convert.to_hf import convert_to_hf
from megatron_taopd.convert.to_megatron import convert_to_megatron
from megatron_taopd.convert.torch_dist import CheckpointReader
from megatron_taopd.models import load_hf_config
from tests.convert.models import BF16, MODELS, assert_same_bytes, save_models, tensors
from tests.models import harness

DENSE_LAYOUTS = ("TP1", "TP2-PP2-SP")
EXPERT_LAYOUTS = ("TP1", "TP2-EP2-SP", "TP2-ETP1-PP2-SP")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = save_models(tmp_path_factory.mktemp("models"))
    (paths["qwen3"] / "tokenizer.json").write_text('{"a": 1}')
    (paths["qwen3"] / "modeling_own.py").write_text("raise RuntimeError")
    return paths


@pytest.fixture(scope="module")
def converted(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("megatron")
    return {name: convert_to_megatron(path, root / name) for name, path in models.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bytes_come_back(models, converted, tmp_path, name) -> None:
    made = convert_to_hf(converted[name], tmp_path / "hf", max_shard_bytes=100_000)
    assert_same_bytes(models[name], made)
    assert load_hf_config(made).raw == load_hf_config(models[name]).raw | {
        "dtype": "bfloat16" if name in BF16 else "float32"
    }
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(made).keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors(made).values())
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]  # nothing is left aside
    model = AutoModelForCausalLM.from_pretrained(made)
    for key, value in AutoModelForCausalLM.from_pretrained(models[name]).state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_what_lies_in_a_converted_checkpoint(models, converted) -> None:
    for name, path in converted.items():
        assert (path / "latest_checkpointed_iteration.txt").read_text() == "release\n"
        assert read_latest_iteration(path) == 0
        assert sorted(file.name for file in path.iterdir()) == ["latest_checkpointed_iteration.txt", "release"]
        assert hf_files_dir(path) == hf_files_dir(path / "release") == path / "release" / "hf"
        hf = load_hf_config(models[name])
        arguments = CheckpointReader(path / "release").common()["args"]
        assert arguments.num_layers == 2 and arguments.hidden_size == hf.hidden_size
        assert arguments.rotary_base == hf.rope_theta and arguments.kv_channels == hf.head_dim
        assert arguments.padded_vocab_size == 512 and arguments.vocab_size == 509
        assert arguments.make_vocab_size_divisible_by == 128
        assert arguments.untie_embeddings_and_output_weights == (not hf.tied)
    kept = sorted(file.name for file in (converted["qwen3"] / "release" / "hf").iterdir())
    assert kept == ["config.json", "generation_config.json", "tokenizer.json"]


def test_a_large_vocabulary_is_stored_in_blocks(models, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(to_megatron, "_BLOCK_BYTES", 20_000)
    made = convert_to_megatron(models["llama2"], tmp_path / "megatron", max_shard_bytes=50_000)
    reader = CheckpointReader(made / "release")
    assert len(reader.row_blocks("output_layer.weight")) == 8
    assert len(list((made / "release").glob("*.distcp"))) > 5
    assert_same_bytes(models["llama2"], convert_to_hf(made, tmp_path / "hf"))


def test_another_type_and_padding(models, tmp_path) -> None:
    made = convert_to_megatron(
        models["mistral"], tmp_path / "megatron", dtype=torch.bfloat16, make_vocab_size_divisible_by=1
    )
    reader = CheckpointReader(made / "release")
    assert reader.tensors["output_layer.weight"].size == (509, 64)
    assert reader.common()["args"].make_vocab_size_divisible_by == 1
    back = tensors(convert_to_hf(made, tmp_path / "hf", dtype=torch.float32))
    for key, value in tensors(models["mistral"]).items():
        assert back[key].dtype == torch.float32 and torch.equal(back[key], value.bfloat16().float())


def _layouts(name: str) -> tuple[str, ...]:
    return EXPERT_LAYOUTS if "moe" in name else DENSE_LAYOUTS


def _describe(path: str) -> dict[str, Any]:
    with open(Path(path) / ".metadata", "rb") as stream:
        index = pickle.load(stream)
    return {
        name: (tuple(entry.size), entry.properties.dtype, entry.properties.requires_grad)
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)  # newer Megatron keeps other objects there as well
    }


def _load_and_save(sources: dict[str, str], converted: dict[str, str], out: str, layout: str) -> None:
    parallel = harness.start(layout)
    for name, source in sources.items():
        dtype = torch.bfloat16 if name in BF16 else torch.float32
        wanted = harness.load(source, parallel, params_dtype=dtype)
        loaded = harness.load(converted[name], parallel, params_dtype=dtype)
        found = dict(loaded.module.named_parameters())
        for key, value in wanted.module.named_parameters():
            assert torch.equal(found[key], value), (name, key)
        save_checkpoint(f"{out}/{name}", iteration=7, module=wanted.module, hf_source=source)


@pytest.mark.parametrize("layout", sorted({*DENSE_LAYOUTS, *EXPERT_LAYOUTS}))
def test_megatron_reads_it_and_its_own_checkpoints_convert(pool, models, converted, tmp_path, layout) -> None:
    names = [name for name in models if layout in _layouts(name)]
    pool(4).run(
        _load_and_save,
        {name: str(models[name]) for name in names},
        {name: str(converted[name]) for name in names},
        str(tmp_path / "saved"),
        layout,
    )
    for name in names:
        saved = tmp_path / "saved" / name
        # Names, whole shapes and types are those that megatron-core gives.
        ours, theirs = _describe(str(converted[name] / "release")), _describe(str(saved / "iter_0000007"))
        for key in ("embedding.word_embeddings.weight", "output_layer.weight"):  # padding depends on the layout
            if key in ours:
                ours[key], theirs[key] = (((509, *size[1:]), *rest) for size, *rest in (ours[key], theirs[key]))
        assert ours == theirs
        assert_same_bytes(models[name], convert_to_hf(saved, tmp_path / "hf" / name))
