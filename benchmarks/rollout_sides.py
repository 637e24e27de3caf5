"""The three that bench_rollout.py compares, on the same weights: our engine, transformers, Megatron-Core's own loop."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

Responses = list[list[int]]
Side = Callable[[list[list[int]], int, tuple[int, ...], int], Responses]
"""(prompts, samples to a prompt, stop tokens, number of the run) -> tokens of every response, with the stop."""


def load_student(path: Path) -> Any:
    """The student as ``taopd train`` holds it, and a process group of one."""
    from megatron_taopd.models import load_model
    from megatron_taopd.platform import distributed
    from megatron_taopd.platform.layout import ParallelConfig

    distributed.initialize(ParallelConfig(), seed=1)
    return load_model(path, ParallelConfig(), params_dtype=torch.float32, trainable=True)


def up_to_stop(tokens: list[int], stop_tokens: tuple[int, ...]) -> list[int]:
    """A response up to its stop token; what comes after is padding."""
    for place, token in enumerate(tokens):
        if token in stop_tokens:
            return tokens[: place + 1]
    return tokens


def ours(student: Any, new_tokens: int) -> Side:
    from megatron_taopd.data.prompts import Prompt
    from megatron_taopd.rollout.config import RolloutConfig
    from megatron_taopd.rollout.megatron import MegatronEngine

    @functools.cache
    def engine(samples: int, stop_tokens: tuple[int, ...]) -> MegatronEngine:
        loaded = replace(student, hf=replace(student.hf, eos_token_ids=stop_tokens))
        config = RolloutConfig(max_response_length=new_tokens, num_samples_per_prompt=samples)
        return MegatronEngine(loaded, config, seed=1)

    def run(prompts: list[list[int]], samples: int, stop_tokens: tuple[int, ...], number: int) -> Responses:
        asked = [Prompt(id=str(i // samples), tokens=tokens) for i, tokens in enumerate(prompts)]
        answers = engine(samples, stop_tokens).generate(asked, step=number, sample_offset=0)
        return [up_to_stop(answer.response_tokens, stop_tokens) for answer in answers]

    return run


def transformers_generate(path: Path, new_tokens: int) -> Side:
    """Prompts padded on the left, as its documentation asks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None

    def run(prompts: list[list[int]], samples: int, stop_tokens: tuple[int, ...], number: int) -> Responses:
        torch.manual_seed(number)
        unique = prompts[::samples]
        longest = max(map(len, unique))
        answer = model.generate(
            torch.tensor([[0] * (longest - len(p)) + p for p in unique]),
            attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in unique]),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            num_return_sequences=samples,
            eos_token_id=list(stop_tokens) or None,
            pad_token_id=0,
        )[: len(prompts), longest:]
        return [up_to_stop(tokens, stop_tokens) for tokens in answer.tolist()]

    return run


def megatron_loop(student: Any, new_tokens: int) -> Side:
    """``TextGenerationController``'s static batch, which StaticInferenceEngine runs, on our model; its sampling."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.inference_request import InferenceRequest
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

    from megatron_taopd.rollout.megatron.wrapper import wrap_model

    class NoText:
        """A tokenizer for tokens that nobody reads."""

        eod = 0

        def detokenize(self, tokens: list[int]) -> str:
            return ""

    class Controller(TextGenerationController):
        """Knows several stop tokens."""

        stop_tokens = torch.tensor([], dtype=torch.int64)

        def update_generation_status(self, **given: Any) -> Any:
            latest = given["updated_prompts_tokens"][:, given["current_context_end_position"]]
            stopped = torch.isin(latest, self.stop_tokens) & given["generation_started"]
            done = given["is_generation_done_tensor"] | stopped
            lengths = given["generated_sequence_lengths"] + (~done & given["generation_started"])
            return done, lengths.int()

    def run(prompts: list[list[int]], samples: int, stop_tokens: tuple[int, ...], number: int) -> Responses:
        for module in student.modules:
            module.eval()
        context = StaticInferenceContext(len(prompts), max(map(len, prompts)) + new_tokens)
        controller = Controller(wrap_model(student.modules, context), NoText())
        controller.stop_tokens = torch.tensor(stop_tokens, dtype=torch.int64)
        controller.sampling_rng.manual_seed(number)
        # A top_p of 1 would sort the vocabulary.
        sampling = SamplingParams(temperature=1.0, top_k=0, top_p=0.0, num_tokens_to_generate=new_tokens)
        requests = OrderedDict(
            (i, InferenceRequest(request_id=i, prompt="", prompt_tokens=list(tokens), sampling_params=sampling))
            for i, tokens in enumerate(prompts)
        )
        controller.generate_all_output_tokens_static_batch(requests)
        # Its answer leaves the stop token out.
        lengths = [request.generated_length for request in requests.values()]
        answers = [request.generated_tokens.tolist() for request in requests.values()]
        return [
            tokens if length == new_tokens else [*tokens, stop_tokens[0]]
            for tokens, length in zip(answers, lengths, strict=True)
        ]

    return run
