"""Logits of loaded models against transformers, at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from transformers import AutoModelForCausalLM

from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.models import harness

TOKENS = torch.randint(0, 509, (3, 24), generator=torch.Generator().manual_seed(5))

# name -> what save_tiny_hf_model is told
MODELS = {
    f"{family}-{'tied' if tied else 'untied'}": dict(family=family, tied=tied, head_dim=head_dim)
    for family, head_dim in (("qwen3", 32), ("qwen2", None), ("llama", 24))
    for tied in (False, True)
} | {
    "mistral": dict(family="mistral", head_dim=24),
    "qwen3_moe": dict(family="qwen3_moe", dense_layers=(1,)),
    "qwen3_moe-plain": dict(family="qwen3_moe", experts_per_token=3, normalize_experts=False, tied=True),
    "llama-linear": dict(family="llama", rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama3.1": dict(
        family="llama",
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny_hf_model(root / name, seed=3, **kind) for name, kind in MODELS.items()}


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, torch.Tensor]:
    logits = {}
    for name, path in models.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            logits[name] = model(TOKENS).logits
    return logits


def _all_logits(paths: dict[str, str], layout: str) -> dict[str, torch.Tensor] | None:
    parallel = harness.start(layout)
    found = {name: harness.forward_logits(harness.load(path, parallel), TOKENS) for name, path in paths.items()}
    return found if all(value is not None for value in found.values()) else None


@pytest.mark.parametrize("layout", harness.LAYOUTS)
def test_logits_agree_with_transformers(pool, models, expected, layout):
    ranks = 1 if layout == "TP1" else 4
    results = pool(ranks).run(_all_logits, {name: str(path) for name, path in models.items()}, layout)
    answering = [result for result in results if result is not None]
    assert len(answering) == ranks // harness.LAYOUTS[layout].get("pipeline_model_parallel_size", 1)
    for result in answering:
        for name, logits in result.items():
            assert (logits - expected[name]).abs().max() <= 1e-4, (layout, name)


THREES = dict(num_heads=6, num_kv_heads=3, head_dim=8, tied=True)


def test_three_ranks(pool, tmp_path):
    """Heads in threes; layers dealt 1, 2, 1 because embedding and LM head count as one each."""
    for family in ("qwen3", "qwen3_moe"):
        path = save_tiny_hf_model(tmp_path / family, family, seed=3, expert_ffn_size=36, **THREES)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.no_grad():
            wanted = model(TOKENS).logits
        for layout, answering in (("TP3", 3), ("PP3-counted", 1)):
            results = [r for r in pool(3).run(_all_logits, {family: str(path)}, layout) if r is not None]
            assert len(results) == answering
            assert all((result[family] - wanted).abs().max() <= 1e-4 for result in results), (family, layout)


def _decode(paths: dict[str, str], layout: str, width: int) -> dict[str, torch.Tensor]:
    """Prefill of 8, then ``width`` tokens a step with the cache: the logits of each step's last token."""
    parallel = harness.start(layout)
    found = {}
    for name, path in paths.items():
        module = harness.load(path, parallel).module
        context = StaticInferenceContext(max_batch_size=3, max_sequence_length=TOKENS.shape[1])
        steps = []
        bounds = [0, *range(8, TOKENS.shape[1] + 1, width)]
        for start, stop in zip(bounds, bounds[1:], strict=False):
            chunk = TOKENS[:, start:stop]
            positions = torch.arange(start, stop).expand_as(chunk)
            with torch.inference_mode():
                logits = module(chunk, positions, None, inference_context=context, runtime_gather_output=True)
            context.increment_sequence_len_offset(stop - start)
            steps.append(logits[:, -1])
        found[name] = torch.stack(steps, dim=1)
    return found


@pytest.mark.parametrize("width", [1, 4])
def test_cached_decoding_gives_the_same_logits_and_never_the_padding(pool, models, expected, width):
    for result in pool(4).run(_decode, {name: str(path) for name, path in models.items()}, "TP2", width):
        for name, logits in result.items():
            assert logits.shape[-1] == 512
            assert (logits[..., 509:] == -torch.inf).all()
            assert (logits[..., :509] - expected[name][:, 7::width]).abs().max() <= 1e-4, name
