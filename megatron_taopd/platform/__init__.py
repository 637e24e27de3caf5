"""What this machine is: CUDA devices with NCCL, or one CPU with gloo and the adaptor for megatron-core.

A room that imports Megatron calls :func:`enable` at the top of its ``__init__.py`` and imports Megatron in
its modules only, so that the adaptor is in place first. Importing this package alone imports neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def has_cuda() -> bool:
    """Whether a CUDA device can be used."""
    import torch

    return torch.cuda.is_available()


def enable() -> None:
    """Install the CPU adaptor where there is no CUDA device. Does nothing the second time, or with CUDA."""
    if not has_cuda():
        from megatron_taopd.platform import cpu_adaptor

        cpu_adaptor.install()


def device() -> torch.device:
    """Device that models and batches of this process live on."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def backend() -> str:
    """``torch.distributed`` backend of this machine: ``nccl`` or ``gloo``."""
    return "nccl" if has_cuda() else "gloo"
