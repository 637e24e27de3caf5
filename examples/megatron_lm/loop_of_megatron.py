"""Where ``megatron.training`` of megatron-core 0.19 is imported, and made to start where it would not.

Four things stand in its way outside NVIDIA's containers, and none concerns the training loop:

- it imports ``typing.override``, which Python has since 3.12;
- ``initialize_megatron`` asserts a CUDA device;
- under tensor parallelism the check of the flags asks for the generation of the GPU;
- it compiles the C++ helpers of Megatron's datasets with a makefile that the wheel leaves out. They are not used here.
"""

from __future__ import annotations

import argparse
import functools
import sys
import typing
from collections.abc import Callable

import typing_extensions

from megatron_taopd import platform

platform.enable()  # before Megatron is imported
if not hasattr(typing, "override"):
    typing.override = typing_extensions.override  # type: ignore[attr-defined]

from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import arguments, global_vars, initialize, training  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402


def parse_arguments(
    add_arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser],
) -> tuple[argparse.Namespace, set[str]]:
    """Megatron's flags of the command line and those that ``add_arguments`` adds, not yet validated; and the names of
    those that are not as they would be without a command line."""
    args = arguments.parse_args(add_arguments)
    words, sys.argv = sys.argv, [sys.argv[0], "--taopd-config", args.taopd_config]
    try:
        defaults = vars(arguments.parse_args(add_arguments))
    finally:
        sys.argv = words
    return args, {name for name, value in vars(args).items() if value != defaults[name]}


def run_pretrain(
    args: argparse.Namespace, datasets: Callable, forward_step: Callable, model_provider: Callable
) -> None:
    """Validate ``args``, make them Megatron's global ones, and train.

    Process groups and model-parallel groups exist already.
    """
    if not platform.has_cuda():
        arguments.get_device_arch_version = lambda: 10  # one for which no order of kernels must be enforced
    arguments.validate_args(args)
    global_vars.set_global_variables(args, build_tokenizer=False)
    initialize._compile_dependencies = lambda: None
    if not platform.has_cuda():
        training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank has its own iterator
    training.pretrain(
        pretrain_cfg_container_from_args(args),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider,
        skip_model_parallel_init=True,
    )
