"""What the plan says a rank holds, against what a rank really holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_taopd import cli
from megatron_taopd.models import load_hf_config
from megatron_taopd.plan.activations import activation_bytes
from megatron_taopd.plan.config import PlanConfig
from megatron_taopd.plan.memory import padded_vocab, stage_memory, train_state
from megatron_taopd.plan.parameters import rank_parameters
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.run_config import RecomputeConfig
from megatron_taopd.testing import WorkerPool
from megatron_taopd.testing.tiny_models import Family, save_tiny_hf_model
from tests.plan.ranks import held_bytes, saved_bytes, step_bytes

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


TP2SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
SELECTIVE = {"recompute_granularity": "selective"}


def full(method: str, num_layers: int) -> dict[str, Any]:
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": num_layers}


@pytest.mark.parametrize(
    ("family", "layout", "recompute"),
    [
        ("qwen3", {}, {}),
        ("llama", {}, {}),
        ("qwen3_moe", {}, {}),
        ("qwen3", TP2SP, {}),
        ("qwen3", {"tensor_model_parallel_size": 2}, {}),
        ("qwen3", TP2SP, SELECTIVE),
        ("llama", {}, SELECTIVE),
        ("qwen3", {}, full("uniform", 1)),
        ("qwen3", TP2SP, full("uniform", 2)),
        ("llama", {}, full("block", 3)),
        ("qwen3_moe", {}, full("uniform", 1)),
    ],
)
def test_activations_are_what_a_forward_keeps(
    pool: Pool, models: Models, family: Family, layout: Layout, recompute: dict[str, Any]
) -> None:
    """And with recomputation what the largest piece adds that the backward makes again."""
    path = models[family, family in ("llama", "qwen3")]
    parallel = ParallelConfig(**layout)
    real = pool(parallel.tensor_model_parallel_size).run(saved_bytes, str(path), 2, 64, layout, recompute)
    planned = activation_bytes(
        load_hf_config(path), parallel, RecomputeConfig(**recompute), stage=0, tokens=128, in_flight=1, size=4
    )
    assert [planned / num_bytes for num_bytes in real] == pytest.approx([1] * len(real), rel=0.1)


PROMPT, RESPONSE, BATCH = 6, 16, 4


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {"bf16": True}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2, "teacher_dtype": "bf16"}),
        (2, {"teacher_tensor_model_parallel_size": 2}),
    ],
)
def test_a_training_step_holds_what_is_planned(
    pool: Pool, models: Models, tmp_path: Path, ranks: int, layout: Layout
) -> None:
    """Teacher, its hidden states, keys and values, gradient and FP8 copies of the heads, but for padded rows."""
    student, teacher = models["qwen2", False], models["qwen3", True]
    prompts = [{"id": str(i), "prompt_tokens": [5 + i] * PROMPT} for i in range(BATCH)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    shared = {
        **{"student": student, "teacher": teacher, "global_batch_size": BATCH, "max_response_length": RESPONSE},
        **{"score_head_precision": "fp8", **layout},
    }
    flags = [f"--{name.replace('_', '-')}{'' if value is True else f'={value}'}" for name, value in shared.items()]
    planned = cli.parse(PlanConfig, [*flags, f"--num-gpus={ranks}", f"--prompt-length={PROMPT}"], name="plan")
    for real in pool(ranks).run(step_bytes, [*flags, f"--prompt-data={tmp_path / 'prompts.jsonl'}"]):
        stage = real.pop("stage")
        wanted = stage_memory(planned, load_hf_config(student), load_hf_config(teacher), stage=stage)
        assert real == pytest.approx({name: getattr(wanted, name) for name in real}, rel=1e-3)
        assert stage < planned.parallel.pipeline_model_parallel_size - 1 or all(real.values())
