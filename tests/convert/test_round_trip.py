"""HF -> Megatron -> HF gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_taopd.checkpoint import save_checkpoint
from megatron_taopd.convert import export_hf
from megatron_taopd.errors import ModelError
from megatron_taopd.models import load_hf_config
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.models import harness

FAMILIES = {
    "qwen3": (True, 32),
    "qwen2": (False, None),
    "llama": (False, 24),
    "mistral": (True, None),
    "qwen3_moe": (False, 24),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("round_trip")
    paths = {
        family: save_tiny_hf_model(root / family, family, tied=tied, head_dim=head_dim, seed=9)
        for family, (tied, head_dim) in FAMILIES.items()
    }
    (paths["qwen3"] / "tokenizer.json").write_text('{"a": 1}')
    (paths["qwen3"] / "chat_template.jinja").write_text("{{ messages }}")
    (paths["qwen3"] / "README.md").write_text("the model card of another model")
    return paths


def _there_and_back(paths: dict[str, str], layout: str, out: str, max_shard_bytes: int, dtype: str) -> None:
    parallel = harness.start(layout)
    for name, path in paths.items():
        loaded = harness.load(path, parallel, params_dtype=getattr(torch, dtype))
        export_hf(loaded.module, loaded.hf, f"{out}/{name}", max_shard_bytes=max_shard_bytes)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("layout", harness.LAYOUTS)
def test_the_same_bytes_come_back(pool, models, tmp_path, layout):
    sharded = layout == "TP2-PP2-SP"
    pool(4).run(
        _there_and_back,
        {name: str(path) for name, path in models.items()},
        layout,
        str(tmp_path),
        100_000 if sharded else 10**9,
        "float32",
    )
    for name, path in models.items():
        before, after = _tensors(path), _tensors(tmp_path / name)
        assert before.keys() == after.keys()
        for tensor, value in before.items():
            assert value.dtype == after[tensor].dtype and torch.equal(value, after[tensor]), (name, tensor)
        assert load_hf_config(tmp_path / name).raw == load_hf_config(path).raw
        assert (tmp_path / name / "model.safetensors.index.json").exists() == sharded
        assert (tmp_path / name / "generation_config.json").read_bytes() == (
            path / "generation_config.json"
        ).read_bytes()
    assert (tmp_path / "qwen3" / "tokenizer.json").exists()
    assert (tmp_path / "qwen3" / "chat_template.jinja").exists()
    assert not (tmp_path / "qwen3" / "README.md").exists()
    assert not list(tmp_path.glob(".*partial*"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3")
    embedding = _tensors(models["qwen3"])["model.embed_tokens.weight"]
    assert torch.equal(model.lm_head.weight, embedding)
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_export_in_bf16_says_so_and_replaces_an_older_model(pool, models, tmp_path):
    paths = {"llama": str(models["llama"])}
    for _ in range(2):
        pool(4).run(_there_and_back, paths, "TP2", str(tmp_path), 10**9, "bfloat16")
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["dtype"] == "bfloat16"
    for tensor, value in _tensors(models["llama"]).items():
        assert torch.equal(value.bfloat16(), _tensors(tmp_path / "llama")[tensor]), tensor
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def _save_megatron(path: str, out: str) -> None:
    loaded = harness.load(path, harness.start("TP2-PP2-SP"))
    save_checkpoint(out, iteration=3, module=loaded.module, hf_source=path)


def test_megatron_checkpoint_is_a_model_too(pool, models, tmp_path):
    pool(4).run(_save_megatron, str(models["qwen3"]), str(tmp_path / "megatron"))
    sources = {"root": str(tmp_path / "megatron"), "iteration": str(tmp_path / "megatron" / "iter_0000003")}
    pool(4).run(_there_and_back, sources, "TP2", str(tmp_path), 10**9, "float32")
    for name in sources:
        for tensor, value in _tensors(models["qwen3"]).items():
            assert torch.equal(value, _tensors(tmp_path / name)[tensor]), (name, tensor)
        assert (tmp_path / name / "chat_template.jinja").exists()


def _refused_export(path: str, out: str) -> str:
    loaded = harness.load(path, harness.start("PP2"))
    with pytest.raises(ModelError) as error:
        export_hf(loaded.module, loaded.hf, out)
    return str(error.value)


def test_export_leaves_other_directories_alone(pool, models, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for message in pool(4).run(_refused_export, str(models["llama"]), str(tmp_path)):
        assert "is not an HF model directory" in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
