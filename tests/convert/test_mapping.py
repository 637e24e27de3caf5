"""Which rule a parameter belongs to, by its name in the local layers and in Transformer Engine's, at any offset."""

from __future__ import annotations

import pytest

from megatron_taopd.convert.mapping import named, rule_for
from megatron_taopd.models import HFModelConfig, load_hf_config
from megatron_taopd.testing.tiny_models import save_tiny_hf_model

# Name on the rank -> layer in the whole model and its HF tensors. The stage has 4 layers before it, the rank 8 experts.
LAYER_OFFSET, EXPERT_OFFSET = 4, 8
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
NAMES: dict[str, tuple[str, int | None, tuple[str, ...]]] = {
    # of both kinds of layer
    "embedding.word_embeddings.weight": ("qwen3", None, ("model.embed_tokens.weight",)),
    "decoder.final_layernorm.weight": ("qwen3", None, ("model.norm.weight",)),
    "output_layer.weight": ("qwen3", None, ("lm_head.weight",)),
    "decoder.layers.0.self_attention.linear_qkv.weight": ("qwen3", 4, tuple(f"{name}.weight" for name in ATTENTION)),
    "decoder.layers.1.self_attention.linear_qkv.bias": ("qwen2", 5, tuple(f"{name}.bias" for name in ATTENTION)),
    "decoder.layers.1.self_attention.q_layernorm.weight": ("qwen3", 5, ("self_attn.q_norm.weight",)),
    "decoder.layers.2.self_attention.linear_proj.weight": ("llama", 6, ("self_attn.o_proj.weight",)),
    "decoder.layers.0.mlp.linear_fc1.weight": ("llama", 4, ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "decoder.layers.1.mlp.router.weight": ("qwen3_moe", 5, ("mlp.gate.weight",)),
    # of the local layers
    "decoder.layers.1.input_layernorm.weight": ("qwen3", 5, ("input_layernorm.weight",)),
    "decoder.layers.0.pre_mlp_layernorm.weight": ("qwen3", 4, ("post_attention_layernorm.weight",)),
    "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight": (
        "qwen3_moe",
        4,
        ("mlp.experts.11.gate_proj.weight", "mlp.experts.11.up_proj.weight"),
    ),
    "decoder.layers.3.mlp.experts.local_experts.0.linear_fc2.weight": (
        "qwen3_moe",
        7,
        ("mlp.experts.8.down_proj.weight",),
    ),
    # of Transformer Engine's: norms within the matrices that they precede, experts as one module
    "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight": ("qwen3", 5, ("input_layernorm.weight",)),
    "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": ("qwen3", 4, ("post_attention_layernorm.weight",)),
    "decoder.layers.0.mlp.experts.linear_fc1.weight3": (
        "qwen3_moe",
        4,
        ("mlp.experts.11.gate_proj.weight", "mlp.experts.11.up_proj.weight"),
    ),
    "decoder.layers.3.mlp.experts.linear_fc2.weight0": ("qwen3_moe", 7, ("mlp.experts.8.down_proj.weight",)),
    "decoder.layers.2.mlp.experts.linear_fc2.weight7": ("qwen3_moe", 6, ("mlp.experts.15.down_proj.weight",)),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HFModelConfig]:
    root = tmp_path_factory.mktemp("configs")
    sizes = dict(num_layers=8, num_experts=16)
    return {
        family: load_hf_config(save_tiny_hf_model(root / family, family, **sizes))
        for family in ("qwen3", "qwen2", "llama", "qwen3_moe")
    }


@pytest.mark.parametrize("name", NAMES)
def test_rule_of_a_name(configs: dict[str, HFModelConfig], name: str) -> None:
    family, wanted_layer, wanted = NAMES[name]
    layer, rule = rule_for(name, configs[family], LAYER_OFFSET, EXPERT_OFFSET)
    assert layer == wanted_layer
    prefix = "" if layer is None else f"model.layers.{layer}."
    assert [named(template, layer) for template in rule.hf] == [prefix + tensor for tensor in wanted]
    assert rule.of_expert == (".experts." in name)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_bias",
        "decoder.layers.0.mlp.experts.linear_fc1.weight8",  # the 17th of 16
    ],
)
def test_a_name_without_a_rule(configs: dict[str, HFModelConfig], name: str) -> None:
    with pytest.raises(RuntimeError, match=f"no conversion rule for parameter '{name}'"):
        rule_for(name, configs["qwen3_moe"], LAYER_OFFSET, EXPERT_OFFSET)
