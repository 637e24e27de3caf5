"""What the ranks run for test_megatron_engine.py: generation at a layout, and training steps around it."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import numpy
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_taopd.data.prompts import Prompt
from megatron_taopd.errors import TaopdError
from megatron_taopd.models import LoadedModel, load_model
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.rollout.config import RolloutConfig
from megatron_taopd.rollout.megatron import MegatronEngine

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
    "TP2PP2SP": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    ),
}
# Here the answers alone are compared, not the training in between.
GENERATION_LAYOUTS = LAYOUTS | {
    "CP2": (2, {"context_parallel_size": 2}),
    "CP2TP2SP": (4, {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2VPP2": (2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
}
MAX_RESPONSE = 10
PROMPTS = (
    [7],
    [31, 5, 250, 12, 9, 9, 41, 77],
    [100, 101, 102],
    [8, 15, 16, 23, 42, 4, 108, 60],
    [2, 5],
    [290, 17],
)
LENGTH = max(map(len, PROMPTS)) + MAX_RESPONSE
SAMPLED = {"temperature": 0.8}
# name -> (options, step)
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "greedy": ({"temperature": 0.0}, 0),
    "sampled": (SAMPLED, 3),
    "again": (SAMPLED, 3),
    "next step": (SAMPLED, 4),
    "small batches": ({**SAMPLED, "rollout_batch_size": 2}, 3),
    "nucleus": ({"temperature": 1.3, "top_p": 0.7}, 0),
}
COMMON_VOCAB = 300


def load(path: str, layout: str) -> LoadedModel:
    distributed.initialize(ParallelConfig(**GENERATION_LAYOUTS[layout][1]), seed=1)
    # Rows of padding have zero weights, hence the logit 0: likely enough to be sampled if nothing forbids it.
    return load_model(
        path,
        ParallelConfig(**GENERATION_LAYOUTS[layout][1]),
        params_dtype=torch.float32,
        padded_vocab_size=1024,
        trainable=True,
    )


def generate(
    student: LoadedModel, options: dict[str, Any], step: int, *, seed: int = 11, **settings: Any
) -> list[dict[str, Any]]:
    """This replica's share of the answers to PROMPTS, as plain values."""
    config = RolloutConfig(max_response_length=MAX_RESPONSE, **options)
    engine = MegatronEngine(student, config, seed=seed, **settings)
    prompts = [Prompt(id=f"p{i}", tokens=list(tokens), extra={"row": i}) for i, tokens in enumerate(PROMPTS)]
    share = len(prompts) // distributed.data_parallel_size()
    start = distributed.data_parallel_rank() * share
    rollouts = engine.generate(prompts[start : start + share], step=step, sample_offset=start)
    assert [p.tokens for p in prompts] == [list(tokens) for tokens in PROMPTS]
    return [asdict(r) for r in rollouts]


def random_states() -> list[Any]:
    return [
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        {name: state.tolist() for name, state in get_cuda_rng_tracker().get_states().items()},
    ]


def generation_case(path: str, layout: str) -> dict[str, Any]:
    """Every run of RUNS, and with part of the vocabulary."""
    student = load(path, layout)
    modes = [m.training for m in student.module.modules()]
    before = random_states()
    answers = {name: generate(student, options, step) for name, (options, step) in RUNS.items()}
    answers["other seed"] = generate(student, SAMPLED, 3, seed=12)
    answers["part of the vocabulary"] = generate(student, SAMPLED, 3, vocab_size=COMMON_VOCAB)
    assert random_states() == before
    assert [m.training for m in student.module.modules()] == modes and student.module.training
    assert student.config.sequence_parallel == ("SP" in layout)
    return {"replica": distributed.data_parallel_rank(), "answers": answers}


def training_case(path: str, other_path: str, layout: str) -> dict[str, Any]:
    """Gradients with and without generation in between; generation from weights that have changed."""
    alone = wrap(load(path, layout))
    wanted = gradients(alone)
    student = load(path, layout)
    wrapped = wrap(student)
    first = generate(student, SAMPLED, 0)
    after_generation = gradients(wrapped)
    # Training at this length finds in Megatron's cache what generation left there.
    assert not student.module.rotary_pos_emb(LENGTH, packed_seq=False, cp_group=None).is_inference()
    second = generate(student, SAMPLED, 0)
    after_both = gradients(wrapped)
    assert first == second
    assert any(bool(g.any()) for g in wanted)
    for one, two, three in zip(wanted, after_generation, after_both, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)

    other = load(other_path, layout)
    with torch.no_grad():
        for ours, theirs in zip(student.module.parameters(), other.module.parameters(), strict=True):
            ours.copy_(theirs)
    return {
        "replica": distributed.data_parallel_rank(),
        "answers": {"greedy": generate(student, {"temperature": 0.0}, 0)},
    }


def wrap(student: LoadedModel) -> DistributedDataParallel:
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=distributed.data_parallel_size() > 1)
    return DistributedDataParallel(config=student.config, ddp_config=ddp, module=student.module)


def gradients(wrapped: DistributedDataParallel) -> list[torch.Tensor]:
    """Gradients of a fixed batch, as long as what generation reads and writes: Megatron caches by length."""
    tokens_BS = (torch.arange(2 * LENGTH) * 37 % 509).view(2, LENGTH)
    wrapped.zero_grad_buffer()

    def loss_func(hidden_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        return hidden_SBH.square().sum(), torch.tensor(1, dtype=torch.int), {}

    def forward_step(data_iterator: Any, model: torch.nn.Module) -> Any:
        return model(tokens_BS, torch.arange(LENGTH).expand(2, -1), None), loss_func

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([None]),
        model=wrapped,
        num_microbatches=1,
        seq_length=LENGTH,
        micro_batch_size=2,
        forward_only=False,
    )
    return [p.main_grad.clone() for p in wrapped.module.parameters()]


def refusal_case(path: str, layout: str) -> list[str]:
    """Messages of what is refused; the last at a student whose weights are broken, on every rank."""
    student = load(path, layout)
    limit = student.hf.max_position_embeddings
    long = [Prompt(id="long", tokens=[5] * (limit - MAX_RESPONSE + 1))]
    messages = []

    def refuse(prompts: list[Prompt], max_response_length: int = MAX_RESPONSE) -> None:
        config = RolloutConfig(max_response_length=max_response_length)
        try:
            MegatronEngine(student, config, seed=1).generate(prompts, step=0, sample_offset=0)
        except TaopdError as error:
            messages.append(str(error))

    refuse(long)
    refuse([Prompt(id="foreign", tokens=[5, 509])])
    refuse([Prompt(id="fine", tokens=[5])], max_response_length=limit)
    with torch.no_grad():
        next(student.module.parameters()).fill_(torch.nan)
    refuse([Prompt(id="sick", tokens=[5])])
    assert student.module.training
    return messages


def sample_names(path: str) -> dict[str, Any]:
    """Three samples to each of two prompts, in batches of four, with text."""
    student = load(path, "TP1")
    config = RolloutConfig(max_response_length=4, num_samples_per_prompt=3, rollout_batch_size=4)
    progress: list[tuple[int, int]] = []
    engine = MegatronEngine(student, config, seed=1, progress=lambda *counts: progress.append(counts))
    prompts = [Prompt(id=name, tokens=tokens) for name, tokens in (("a", [9]), ("b", [9, 10])) for _ in range(3)]
    rollouts = engine.generate(prompts[2:], step=0, sample_offset=2)
    return {
        "rollouts": [asdict(r) for r in rollouts],
        "progress": progress,
        "none": engine.generate([], step=0, sample_offset=0),
    }
