"""What the ranks run for test_generation.py: hidden states, counts of forwards, single prompts, sharded sampling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_taopd.data.prompts import Prompt
from megatron_taopd.data.records import Rollout
from megatron_taopd.models import LoadedModel, load_model
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.rollout.config import RolloutConfig
from megatron_taopd.rollout.megatron import MegatronEngine
from megatron_taopd.rollout.sampling import choose_tokens
from megatron_taopd.training.sources import even_share

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
}
# Of a mixture of experts: replicas that share experts read prompts of their own.
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "PP2EP2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "TP2SP, EP4": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 4,
            "expert_tensor_parallel_size": 1,
        },
    ),
}
MAX_RESPONSE = 16
# One id in ten ends a response, so that samples leave the batch all the time.
STOP_TOKENS = tuple(range(3, 509, 10))


def make_prompts() -> list[Prompt]:
    """Lengths from 1 to 90 out of order, so that several forwards read them; some prompts come more than once."""
    generator = torch.Generator().manual_seed(4)
    drawn = [torch.randint(4, 500, (n,), generator=generator).tolist() for n in (40, 3, 90, 1, 17, 88, 5)]
    tokens = [drawn[0], drawn[1], drawn[1], drawn[1], *drawn[2:], drawn[0], drawn[4]]
    return [Prompt(id=str(i), tokens=list(t)) for i, t in enumerate(tokens)]


def load(path: str, layout: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    parallel = ParallelConfig(**(LAYOUTS | EXPERT_LAYOUTS)[layout][1])
    distributed.initialize(parallel, seed=1)
    student = load_model(path, parallel, params_dtype=dtype, padded_vocab_size=1024, trainable=True)
    return replace(student, hf=replace(student.hf, eos_token_ids=STOP_TOKENS))


def generate(student: LoadedModel, *, keep_hidden: bool = False, **options: Any) -> list[Rollout]:
    """This replica's share of the answers to all prompts."""
    config = RolloutConfig(max_response_length=MAX_RESPONSE, **options)
    engine = MegatronEngine(student, config, seed=3, keep_hidden=keep_hidden)
    prompts = make_prompts()
    place = even_share(len(prompts))
    return engine.generate(prompts[place], step=1, sample_offset=place.start)


def hidden_case(path: str, layout: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Responses, and the hidden states kept with them where there are any."""
    student = load(path, layout, dtype)
    rollouts = generate(student, keep_hidden=True)
    assert all(r.hidden_TH is None for r in generate(student))
    return {
        "replica": distributed.data_parallel_rank(),
        "last stage": distributed.is_last_stage(),
        "tokens": [(r.prompt_tokens, r.response_tokens) for r in rollouts],
        "hidden": [r.hidden_TH for r in rollouts],
    }


def forwards_case(path: str, layout: str) -> dict[str, Any]:
    """Rows and length of every forward of the decoder."""
    student = load(path, layout)
    shapes = []
    hook = student.module.decoder.register_forward_hook(
        lambda module, args, output: shapes.append((output.shape[1], output.shape[0]))
    )
    rollouts = generate(student)
    hook.remove()
    return {"shapes": shapes, "lengths": [len(r.response_tokens) for r in rollouts]}


def single_case(path: str, **options: Any) -> dict[str, list[Any]]:
    """All prompts together, and each in a batch of its own."""
    student = load(path, "TP1")
    found = {}
    for name, size in (("together", 64), ("alone", 1)):
        rollouts = generate(student, rollout_batch_size=size, **options)
        found[name] = [(r.response_tokens, r.response_logprobs, r.finish_reason) for r in rollouts]
    return found


def sharded_sampling_case(
    logits_BV: torch.Tensor, numbers_B: torch.Tensor, settings: list[dict[str, Any]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and log-probabilities with this rank's columns alone."""
    group = torch.distributed.group.WORLD
    columns = logits_BV.shape[1] // group.size()
    own = logits_BV[:, group.rank() * columns : (group.rank() + 1) * columns]
    return [choose_tokens(own, numbers_B, group=group, **setting) for setting in settings]
