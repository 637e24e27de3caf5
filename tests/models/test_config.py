"""HF configurations that can and cannot be built, and layouts that divide a model or not."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_taopd.errors import ConfigError, ModelError
from megatron_taopd.models import (
    build_transformer_config,
    load_hf_config,
    pad_vocab_size,
    refuse_expert_layout_in_vain,
)
from megatron_taopd.models.source import hf_directory
from megatron_taopd.platform.layout import ParallelConfig, TeacherLayout

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "rope_theta": 100000,
    "rope_scaling": None,
}


def _write(path: Path, raw: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_fields_of_an_older_file(tmp_path):
    hf = load_hf_config(_write(tmp_path, LLAMA))
    assert (hf.family, hf.head_dim, hf.num_kv_heads, hf.tied) == ("llama", 64, 3, True)
    assert (hf.rope_theta, hf.rope_scaling, hf.qkv_bias, hf.qk_norm) == (100000.0, None, False, False)
    assert hf.eos_token_ids == (2,)


def test_rope_parameters_and_stop_tokens_of_a_newer_file(tmp_path):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    raw = {key: value for key, value in LLAMA.items() if not key.startswith("rope")} | {"rope_parameters": rope}
    hf = load_hf_config(_write(tmp_path, raw, {"eos_token_id": [2, 7]}))
    assert hf.rope_theta == 500000.0
    assert hf.rope_scaling == {key: value for key, value in rope.items() if key != "rope_theta"}
    assert hf.eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*Qwen3ForCausalLM, Qwen3MoeForCausalLM"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "'yarn' is not supported; supported: default, linear",
        ),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"intermediate_size": None}, "no 'intermediate_size'"),
        ({"num_key_value_heads": 2}, "9 attention heads are not a multiple of 2"),
    ],
)
def test_what_cannot_be_built_is_refused(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        load_hf_config(_write(tmp_path, LLAMA | change))


def test_sources(tmp_path):
    with pytest.raises(ModelError, match="'Qwen/Qwen3-8B' is not a directory here"):
        load_hf_config("Qwen/Qwen3-8B")
    with pytest.raises(ModelError, match="neither config.json"):
        load_hf_config(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12\n")
    inner = _write(tmp_path / "iter_0000012" / "hf", LLAMA)
    assert hf_directory(tmp_path) == hf_directory(tmp_path / "iter_0000012") == inner
    (inner / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read .*config.json"):
        load_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor_model_parallel_size": 2}, "--tensor-model-parallel-size 2 .* 9 attention heads .*1, 3, 9"),
        ({"tensor_model_parallel_size": 9}, "3 key-value heads .*: 1, 3$"),
        ({"pipeline_model_parallel_size": 4}, "--pipeline-model-parallel-size 4 .* 30 layers"),
    ],
)
def test_layout_that_does_not_divide(tmp_path, layout, message):
    hf = load_hf_config(_write(tmp_path, LLAMA))
    with pytest.raises(ConfigError, match=message):
        build_transformer_config(hf, ParallelConfig(**layout), params_dtype=torch.float32)


MOE: dict[str, Any] = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 10,
    "norm_topk_prob": True,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [3, 4],
}


def test_experts_of_a_config(tmp_path):
    hf = load_hf_config(_write(tmp_path, MOE))
    assert hf.experts is not None and hf.qk_norm
    assert [layer for layer in range(30) if hf.has_experts(layer)] == [1, *range(5, 30, 2)]
    config = build_transformer_config(hf, ParallelConfig(), params_dtype=torch.bfloat16)
    assert (config.num_moe_experts, config.moe_ffn_hidden_size, config.moe_router_topk) == (6, 10, 2)
    assert config.moe_layer_freq[:6] == [0, 1, 0, 0, 0, 1]
    # Nothing balances a teacher's experts, and nothing drops tokens.
    assert config.moe_aux_loss_coeff == 0.0 and not config.moe_router_enable_expert_bias
    assert config.moe_expert_capacity_factor is None
    plain = load_hf_config(_write(tmp_path / "plain", MOE | {"norm_topk_prob": False, "mlp_only_layers": None}))
    assert build_transformer_config(plain, ParallelConfig(), params_dtype=torch.float32).moe_router_pre_softmax


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": None}, "no 'num_experts'"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 must be between 1 and 6"),
        ({"num_experts_per_tok": 1}, "makes every weight 1"),
        ({"moe_intermediate_size": None}, "no 'moe_intermediate_size'"),
    ],
)
def test_experts_that_cannot_be_built_are_refused(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        load_hf_config(_write(tmp_path, MOE | change))


def test_windows_of_mistral(tmp_path):
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    with pytest.raises(ModelError, match="sliding-window attention .*sliding_window null"):
        load_hf_config(_write(tmp_path, mistral))
    for harmless in ({"sliding_window": None}, {"max_position_embeddings": 4096}):
        assert load_hf_config(_write(tmp_path, mistral | harmless)).family == "mistral"


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"expert_model_parallel_size": 4}, "--expert-model-parallel-size 4 .* 6 experts .*1, 2, 3, 6"),
        ({"expert_tensor_parallel_size": 3}, "--expert-tensor-parallel-size 3 .* 10 ffn rows of an expert"),
        ({"pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 9}, "leave 21 of the 30 layers"),
        ({"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 30}, "leave 0 of the 30"),
        (
            {"pipeline_model_parallel_size": 3, "account_for_loss_in_pipeline_split": True},
            "does not divide the 31 layers .*, with 1 counted",
        ),
        (
            {"pipeline_model_parallel_size": 31, "account_for_loss_in_pipeline_split": True},
            "without any of the 30 layers",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
            "gives a stage 15 of the 30 layers .* 2 does not divide; sizes that divide 15: 1, 3, 5, 15",
        ),
        (
            {
                "pipeline_model_parallel_size": 3,
                "num_virtual_stages_per_pipeline_rank": 2,
                "decoder_first_pipeline_num_layers": 7,
                "decoder_last_pipeline_num_layers": 11,
            },
            "gives a stage 7 of the 30 layers",
        ),
    ],
)
def test_experts_and_stages_that_do_not_divide(tmp_path, layout, message):
    hf = load_hf_config(_write(tmp_path, MOE))
    with pytest.raises(ConfigError, match=message):
        build_transformer_config(hf, ParallelConfig(**layout), params_dtype=torch.float32)


def test_messages_name_the_teachers_flags(tmp_path):
    hf = load_hf_config(_write(tmp_path, LLAMA))
    with pytest.raises(
        ConfigError, match="--teacher-pipeline.* 4 .* or give --teacher-decoder-first-pipeline-num-layers"
    ):
        build_transformer_config(hf, TeacherLayout(pipeline_model_parallel_size=4), params_dtype=torch.float32)
    with pytest.raises(ConfigError, match="--teacher-decoder-first-.* 9 and --teacher-decoder-last-.* leave 21"):
        layout = TeacherLayout(pipeline_model_parallel_size=3, decoder_first_pipeline_num_layers=9)
        build_transformer_config(hf, layout, params_dtype=torch.float32)


SPLITS: tuple[dict[str, Any], ...] = (
    {},
    {"decoder_first_pipeline_num_layers": 2},
    {"decoder_last_pipeline_num_layers": 4},
    {"decoder_first_pipeline_num_layers": 4, "decoder_last_pipeline_num_layers": 2},
    {"account_for_embedding_in_pipeline_split": True},
    {"account_for_loss_in_pipeline_split": True},
    {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
)


def test_every_accepted_split_deals_each_layer_once(tmp_path):
    """By megatron-core's own count, in the order of the forward pass; what it cannot do is refused before."""
    accepted = set()
    for layers in range(4, 13):
        hf = load_hf_config(_write(tmp_path / str(layers), LLAMA | {"num_hidden_layers": layers}))
        for stages, virtual, number in itertools.product((2, 3), (None, 2, 3), range(len(SPLITS))):
            sizes = {"pipeline_model_parallel_size": stages, "num_virtual_stages_per_pipeline_rank": virtual}
            try:
                parallel = ParallelConfig(**sizes, **SPLITS[number])
                config = build_transformer_config(hf, parallel, params_dtype=torch.float32)
            except ConfigError as error:
                assert "megatron-core refuses" not in str(error)
                continue
            pieces = itertools.product((None,) if virtual is None else range(virtual), range(stages))
            dealt, of_stage = [], [0] * stages
            for piece, stage in pieces:
                first, count = (
                    f(config, piece, stage) for f in (get_transformer_layer_offset, get_num_layers_to_build)
                )
                of_stage[stage] += count
                dealt += range(first, first + count)
            assert min(of_stage) > 0  # a piece of it may be empty: embedding or LM head alone
            assert dealt == list(range(layers)), (layers, sizes, SPLITS[number])
            accepted.add((virtual, number))
    assert accepted >= set(itertools.product((None, 2), range(len(SPLITS))))


def test_expert_layout_without_experts(tmp_path):
    dense, experts = load_hf_config(_write(tmp_path, LLAMA)), load_hf_config(_write(tmp_path / "moe", MOE))
    parallel = ParallelConfig(expert_model_parallel_size=2)
    with pytest.raises(ConfigError, match="--expert-model-parallel-size 2 has no effect: no experts in"):
        refuse_expert_layout_in_vain(parallel, dense, dense)
    refuse_expert_layout_in_vain(parallel, dense, experts)
    # A student without experts beside a teacher that has some.
    assert build_transformer_config(dense, parallel, params_dtype=torch.float32).expert_model_parallel_size == 1


def test_settings_that_megatron_would_ignore_or_refuse(tmp_path):
    hf = load_hf_config(_write(tmp_path, LLAMA))
    build = dict(params_dtype=torch.float32)
    with pytest.raises(ConfigError, match="fp8 needs Transformer Engine.*fp8='hybrid'"):
        build_transformer_config(hf, ParallelConfig(), **build, fp8="hybrid")
    with pytest.raises(ConfigError, match="no_such_field"):
        build_transformer_config(hf, ParallelConfig(), **build, no_such_field=1)
    with pytest.raises(ConfigError, match="megatron-core refuses"):
        build_transformer_config(hf, ParallelConfig(), **build, recompute_granularity="nonsense")


def test_parallel_config_checks_what_it_can():
    for settings, message in (
        ({"tensor_model_parallel_size": 0}, "--tensor-model-parallel-size must be at least 1, got 0"),
        ({"expert_tensor_parallel_size": 0}, "--expert-tensor-parallel-size must be at least 1, got 0"),
        ({"decoder_first_pipeline_num_layers": 1}, "no effect with --pipeline-model-parallel-size 1"),
        (
            {
                "pipeline_model_parallel_size": 2,
                "decoder_last_pipeline_num_layers": 1,
                "account_for_loss_in_pipeline_split": True,
            },
            "--decoder-last-pipeline-num-layers and --account-for-loss-in-pipeline-split are two ways",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "num_virtual_stages_per_pipeline_rank": 2,
                "decoder_first_pipeline_num_layers": 2,
                "decoder_last_pipeline_num_layers": 2,
            },
            "with virtual stages megatron-core divides by the number of stages between",
        ),
        ({"sequence_parallel": True}, "no effect with --tensor-model-parallel-size 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            ParallelConfig(**settings)


def test_vocabularies_are_padded_together():
    assert pad_vocab_size(509, tp=1) == pad_vocab_size(509, 500, tp=4) == 512
    assert pad_vocab_size(509, 523, tp=2) == 768
    assert pad_vocab_size(151936, 152064, tp=8) == 152576
    assert pad_vocab_size(10, tp=3, multiple=1) == 12
