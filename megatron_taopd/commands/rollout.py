"""``taopd rollout``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_taopd.cli import parse
from megatron_taopd.commands.common import announce, ranks
from megatron_taopd.config import RolloutCommandConfig


def rollout(words: Sequence[str]) -> None:
    """A student's responses to a prompt file."""
    config: RolloutCommandConfig = parse(RolloutCommandConfig, words, name="rollout")
    with ranks(config.parallel, seed=config.seed):
        run_rollout(config)


def run_rollout(config: RolloutCommandConfig) -> None:
    """Generate as configured; process groups exist."""
    import torch

    from megatron_taopd.data.prompts import read_prompts
    from megatron_taopd.data.records import write_rollouts
    from megatron_taopd.data.tokenizer import load_tokenizer
    from megatron_taopd.models import (
        fp8_fields,
        load_hf_config,
        load_model,
        pad_vocab_size,
        refuse_expert_layout_in_vain,
    )
    from megatron_taopd.rollout.megatron import MegatronEngine
    from megatron_taopd.training.pair import params_dtype
    from megatron_taopd.training.sources import even_share, gather_rollouts

    announce(config, "taopd rollout")
    prompts = read_prompts(config.data, load_tokenizer(config.student))
    samples = [p for p in prompts for _ in range(config.rollout.num_samples_per_prompt)]
    place = even_share(len(samples))
    hf = load_hf_config(config.student)
    refuse_expert_layout_in_vain(config.parallel, hf)
    student = load_model(
        config.student,
        config.parallel,
        params_dtype=params_dtype(config.precision),
        padded_vocab_size=pad_vocab_size(hf.vocab_size, tp=config.parallel.tensor_model_parallel_size),
        trainable=False,
        overrides=fp8_fields(config.precision.fp8_settings(), hf, config.parallel, trained=False),
    )
    engine = MegatronEngine(student, config.rollout, seed=config.seed)
    rollouts = gather_rollouts(engine.generate(samples[place], step=0, sample_offset=place.start))
    if rollouts is not None:
        write_rollouts(config.output, rollouts)
        tokens = sum(len(r.response_tokens) for r in rollouts)
        stopped = sum(r.finish_reason == "stop" for r in rollouts)
        print(
            f"> {len(rollouts)} responses ({tokens} tokens, {stopped} ended by themselves): {config.output}",
            flush=True,
        )
    torch.distributed.barrier()
