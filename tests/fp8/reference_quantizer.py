"""Runs in a process of its own: NVIDIA's pure-torch quantizer, from an unpacked wheel, on tensors in a file.

``python reference_quantizer.py FOLDER IN OUT``: IN holds a list of 2-D tensors, OUT gets (numbers, factor) of each.
Transformer Engine itself is never imported: its package needs CUDA libraries. Its parent packages are empty stand-ins
here, and what the quantizer's module imports from others is the base classes' names alone.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import torch

_QUANTIZER = "transformer_engine.pytorch.custom_recipes.quantization_current_scaling"


class _Base:
    def __init__(self, *, rowwise: bool = True, columnwise: bool = True) -> None:
        self.rowwise_usage, self.columnwise_usage = rowwise, columnwise


class _Storage:
    pass


def reference(folder: Path) -> types.ModuleType:
    """The module of the wheel that holds the quantizer, as it is in the file."""
    package = folder / "transformer_engine"
    for name in ("", ".pytorch", ".pytorch.custom_recipes"):
        module = types.ModuleType(f"transformer_engine{name}")
        module.__path__ = [str(package.joinpath(*name.split(".")))]
        sys.modules[module.__name__] = module
    tensors = types.ModuleType("transformer_engine.pytorch.quantized_tensor")
    tensors.QuantizedTensorStorage, tensors.Quantizer = _Storage, _Base  # type: ignore[attr-defined]
    sys.modules[tensors.__name__] = tensors
    return importlib.import_module(_QUANTIZER)


def main(folder: str, inputs: str, outputs: str) -> None:
    """Quantize every tensor of the file as a whole."""
    module = reference(Path(folder))
    quantizer = module.CurrentScalingQuantizerRef(torch.float8_e4m3fn, rowwise=True, columnwise=False)
    found = []
    for tensor in torch.load(inputs):
        result = quantizer.quantize(tensor)
        found.append((result.data.view(torch.uint8), result.scale))
    torch.save(found, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
