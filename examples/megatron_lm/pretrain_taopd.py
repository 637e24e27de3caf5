"""TA-OPD in Megatron's own training loop: ``megatron.training.pretrain`` calls our model, data and forward step.

    torchrun --nproc-per-node 2 examples/megatron_lm/pretrain_taopd.py --taopd-config recipe.yaml --bf16 ...

Megatron's flags say everything about layout, batch, optimizer, checkpoints and logs; ``--taopd-config`` names models,
responses, selection and loss. See the README beside this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch
import yaml
from megatron.core.transformer import TransformerConfig

from megatron_taopd import platform
from megatron_taopd.cli import parse
from megatron_taopd.config import TrainConfig
from megatron_taopd.data.batches import make_micro_batches
from megatron_taopd.errors import ConfigError, TaopdError
from megatron_taopd.models import HFModelConfig, build_transformer_config, load_hf_config, pad_vocab_size
from megatron_taopd.platform import distributed
from megatron_taopd.training.loop import local_batch_size
from megatron_taopd.training.pair import ModelPair, load_pair, params_dtype
from megatron_taopd.training.scopes import GlobalScope
from megatron_taopd.training.sources import open_source
from megatron_taopd.training.step import DistillationForwardStep, TrainMicroBatch

# The rooms of TrainConfig that Megatron's own flags say nothing about.
OURS = ("models", "data", "rollout", "selection", "loss", "scoring")
# Megatron's flags that have an equal in TrainConfig.
SHARED = (
    "tensor_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "micro_batch_size",
    "global_batch_size",
    "train_iters",
    "seed",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Our one flag beside Megatron's."""
    parser.add_argument_group("taopd").add_argument(
        "--taopd-config", required=True, help="YAML of models, responses, selection and loss: flags of taopd train"
    )
    return parser


def read_recipe(args: argparse.Namespace) -> TrainConfig:
    """Our configuration: the file's part, and Megatron's flags for the rest.

    Raises:
        ConfigError: a key that Megatron has its own flag for, or a setting that this loop cannot serve.
    """
    with open(args.taopd_config, encoding="utf-8") as file:
        keys = yaml.safe_load(file)
    rooms = typing.get_type_hints(TrainConfig)
    ours = {field.name for room in OURS for field in dataclasses.fields(rooms[room])}
    foreign = sorted(key for key in keys if key.replace("-", "_") not in ours)
    if foreign:
        raise ConfigError(
            f"{args.taopd_config}: {', '.join(foreign)}: Megatron's own flags say that in this loop, "
            "or the loop has no such setting"
        )
    if getattr(args, "recompute_activations", False):  # Megatron's short form, which it resolves later
        args.recompute_granularity = "selective"
    words = ["--config", args.taopd_config]
    for name in SHARED:
        if getattr(args, name) is not None:
            words += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    words += [flag for flag, value in (("--bf16", args.bf16), ("--sequence-parallel", args.sequence_parallel)) if value]
    config: TrainConfig = parse(TrainConfig, words, name="train")
    refused = {
        "--selection-scope carried (Megatron's checkpoints would not keep its state)": (
            config.selection.selection_scope != "global"
        ),
        "--pipeline-model-parallel-size (a step is scored when its first micro-batch is asked for)": (
            args.pipeline_model_parallel_size > 1
        ),
        "--context-parallel-size": args.context_parallel_size > 1,
        "--packed-sequences": config.packing.packed_sequences,
        "several --teacher (each would need micro-batches of its own)": len(config.models.teacher) > 1,
        "--fp16": args.fp16,
        "--fp8-format, --fp4-format": bool(getattr(args, "fp8", None) or getattr(args, "fp4", None)),
        "--overlap-grad-reduce, --overlap-param-gather (scoring calls the student between its backward passes)": (
            args.overlap_grad_reduce or args.overlap_param_gather
        ),
        "--eval-interval (there is no validation set)": args.eval_interval is not None,
    }
    for setting, is_set in refused.items():
        if is_set:
            raise ConfigError(f"{setting}: not in this loop; `taopd train` has a loop of its own")
    return config


def architecture(args: argparse.Namespace, hf: HFModelConfig) -> dict[str, Any]:
    """Megatron's architecture flags, from the student's config.json: its logs and checks read them."""
    values = dict(
        num_layers=hf.num_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.ffn_size,
        num_attention_heads=hf.num_heads,
        group_query_attention=True,
        num_query_groups=hf.num_kv_heads,
        kv_channels=hf.head_dim,
        swiglu=True,
        max_position_embeddings=hf.max_position_embeddings,
        untie_embeddings_and_output_weights=not hf.tied,
        vocab_size=hf.vocab_size,
        padded_vocab_size=pad_vocab_size(hf.vocab_size, tp=args.tensor_model_parallel_size),
        num_experts=hf.num_experts or None,
        # What our model is built with, whatever these say.
        transformer_impl="transformer_engine" if platform.has_cuda() else "local",
        calculate_per_token_loss=True,
    )
    if hf.experts is not None:
        values |= dict(
            moe_ffn_hidden_size=hf.experts.ffn_size,
            moe_router_topk=hf.experts.experts_per_token,
            moe_token_dispatcher_type="alltoall",
        )
    return values


def student_config(config: TrainConfig) -> TransformerConfig:
    """What :func:`load_pair` builds the student with."""
    return build_transformer_config(
        load_hf_config(config.models.student),
        config.parallel,
        params_dtype=params_dtype(config.precision),
        **vars(config.recompute),
    )


def describe_model(args: argparse.Namespace, given: set[str], hf: HFModelConfig, config: TransformerConfig) -> None:
    """Put the student's architecture into Megatron's flags.

    Args:
        given: names of flags that the command line sets.
        config: what the student is built with.

    Raises:
        ConfigError: a flag asks for a model other than the one that is built.
    """
    values = architecture(args, hf)
    built = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | values
    for name in sorted(given & built.keys()):
        if getattr(args, name) != built[name]:
            raise ConfigError(
                f"{name} = {getattr(args, name)!r} by Megatron's flags, and the student is built with "
                f"{built[name]!r}: its directory and --taopd-config say what it is; drop the flag"
            )
    vars(args).update(values)
    args.dataloader_type = "external"
    args.eval_iters, args.eval_interval = 0, args.train_iters


class ScoredBatches:
    """A step's micro-batches, one after the other. The first of a step makes the step: responses, scores, selection."""

    def __init__(self, config: TrainConfig, pair: ModelPair, *, consumed_samples: int) -> None:
        self.config = config
        self.pair = pair
        self.source = open_source(config, pair)
        temperature = config.scoring.resolve_temperature(config.rollout.temperature)
        self.scope = GlobalScope(config, pair, pair.student.modules, temperature=temperature)
        self.consumed_samples = consumed_samples
        self.waiting: list[TrainMicroBatch] = []

    def __iter__(self) -> Iterator[TrainMicroBatch]:
        return self

    def __next__(self) -> TrainMicroBatch:
        if not self.waiting:
            self.waiting = self.new_step()
        return self.waiting.pop(0)

    def new_step(self) -> list[TrainMicroBatch]:
        """Responses of the student as it is now, read by both models; what is kept of them."""
        batch = self.config.batch
        step = self.consumed_samples // batch.global_batch_size
        if self.scope.outcome is not None:
            self.scope.after(step=step - 1)
        rollouts = self.source.responses(
            consumed_samples=self.consumed_samples, global_batch_size=batch.global_batch_size, step=step
        )
        self.consumed_samples += batch.global_batch_size
        parallel = self.config.parallel
        micro_batches = make_micro_batches(
            rollouts,
            micro_batch_size=batch.micro_batch_size,
            sample_offset=distributed.data_parallel_rank()
            * local_batch_size(batch.global_batch_size, batch.micro_batch_size, self.config.parallel),
            length_multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
        )
        return self.scope.before(micro_batches, step=step)


class ForwardStep:
    """What ``pretrain`` calls for every micro-batch: our forward step, its report as Megatron's log averages it."""

    def __init__(self, config: TrainConfig, pair: ModelPair) -> None:
        self.dtype = pair.student.config.params_dtype
        self.step = DistillationForwardStep(
            pair=pair,
            loss=config.loss,
            support_k=config.selection.support_k,
            temperature=config.scoring.resolve_temperature(config.rollout.temperature),
            logits_chunk_bytes=config.scoring.logits_chunk_bytes,
        )

    def __call__(self, data_iterator: Iterator[TrainMicroBatch], model: torch.nn.Module) -> tuple[Any, Callable]:
        output, loss_func = self.step(data_iterator, model)

        def report(hidden_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            loss_sum, num_tokens, values = loss_func(hidden_SBH)
            # A pair (sum, count) is summed over the global batch and divided once.
            return loss_sum, num_tokens, {"distillation loss": torch.stack([values["loss_sum"], num_tokens.float()])}

        # Under bf16 Megatron's wrapper answers fp32 copies of bf16 hidden states.
        return output.to(self.dtype), report


def main() -> None:
    """Parse, lay out the ranks, and hand everything to ``pretrain``."""
    import loop_of_megatron as megatron

    args, given = megatron.parse_arguments(add_arguments)
    config = read_recipe(args)
    distributed.initialize(config.parallel, seed=config.seed)
    describe_model(args, given, load_hf_config(config.models.student), student_config(config))
    made: list[ModelPair] = []  # `pretrain` builds the model first and asks for the data afterwards

    def model_provider(**unused: Any) -> torch.nn.Module:
        made.append(
            load_pair(config.models, config.parallel, config.precision, train_student=True, recompute=config.recompute)
        )
        return made[0].student.module

    def datasets(num_samples: Any) -> tuple[ScoredBatches, None, None]:
        return ScoredBatches(config, made[0], consumed_samples=args.consumed_train_samples), None, None

    def forward_step(data_iterator: Iterator[TrainMicroBatch], model: torch.nn.Module) -> tuple[Any, Callable]:
        nonlocal step
        step = step or ForwardStep(config, made[0])
        return step(data_iterator, model)

    step: ForwardStep | None = None
    megatron.run_pretrain(args, datasets, forward_step, model_provider)
    distributed.shutdown()


if __name__ == "__main__":
    try:
        main()
    except TaopdError as error:
        sys.exit(f"pretrain_taopd: error: {error}")
