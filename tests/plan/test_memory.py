"""What the plan says a rank holds, against what a rank really holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_taopd.models import load_hf_config
from megatron_taopd.plan.activations import activation_bytes
from megatron_taopd.plan.memory import padded_vocab, train_state
from megatron_taopd.plan.parameters import rank_parameters
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.run_config import RecomputeConfig
from megatron_taopd.testing import WorkerPool
from megatron_taopd.testing.tiny_models import Family, save_tiny_hf_model
from tests.plan.ranks import held_bytes, saved_bytes

Layout = dict[str, Any]
Models = dict[tuple[Family, bool], Path]
Pool = Callable[[int], WorkerPool]

# name -> (ranks, family, tied, layout, bf16, distributed optimizer)
CASES: dict[str, tuple[int, Family, bool, Layout, bool, bool]] = {
    "TP1": (1, "qwen3", True, {}, False, False),
    "TP2": (2, "qwen3", False, {"tensor_model_parallel_size": 2}, True, False),
    "PP2-tied": (2, "qwen3", True, {"pipeline_model_parallel_size": 2}, True, False),
    "DP2-distopt": (2, "qwen2", False, {}, True, True),
    "DP2-distopt-fp32": (2, "qwen3", True, {}, False, True),
    "EP2": (2, "qwen3_moe", False, {"expert_model_parallel_size": 2}, True, True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("plan")
    wanted: set[tuple[Family, bool]] = {(family, tied) for _, family, tied, *_ in CASES.values()}
    wanted.add(("llama", True))
    return {
        (family, tied): save_tiny_hf_model(root / f"{family}-{tied}", family, tied=tied, hidden_size=128, ffn_size=256)
        for family, tied in sorted(wanted)
    }


@pytest.mark.parametrize("name", CASES)
def test_train_state_is_what_ranks_hold(pool: Pool, models: Models, name: str) -> None:
    ranks, family, tied, layout, bf16, distributed_optimizer = CASES[name]
    path = models[family, tied]
    hf, parallel = load_hf_config(path), ParallelConfig(**layout)
    padded = padded_vocab(hf, tensor=parallel.tensor_model_parallel_size)
    held = pool(ranks).run(held_bytes, str(path), layout, bf16=bf16, distributed_optimizer=distributed_optimizer)
    for real in held:
        state = train_state(
            rank_parameters(hf, parallel, stage=real["stage"], padded_vocab_size=padded),
            bf16=bf16,
            replicas=ranks // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size),
            expert_replicas=ranks // parallel.expert_parallel_size,
            distributed_optimizer=distributed_optimizer,
        )
        assert state.parameters == real["parameters"]
        assert state.gradients == pytest.approx(real["gradients"], rel=0.1)
        assert state.optimizer == pytest.approx(real["optimizer"], rel=0.1)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", {}),
        ("llama", {}),
        ("qwen3_moe", {}),
        ("qwen3", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ("qwen3", {"tensor_model_parallel_size": 2}),
    ],
)
def test_activations_are_what_a_forward_keeps(pool: Pool, models: Models, family: Family, layout: Layout) -> None:
    path = models[family, family in ("llama", "qwen3")]
    parallel = ParallelConfig(**layout)
    real = pool(parallel.tensor_model_parallel_size).run(saved_bytes, str(path), 2, 64, layout)
    planned = activation_bytes(
        load_hf_config(path), parallel, RecomputeConfig(), stage=0, tokens=128, in_flight=1, size=4
    )
    assert [planned / num_bytes for num_bytes in real] == pytest.approx([1] * len(real), rel=0.1)
