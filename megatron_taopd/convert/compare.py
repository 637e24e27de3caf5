"""Where a model differs from its original: configuration, arguments and tensors, without running either."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_taopd.checkpoint.layout import is_megatron_checkpoint
from megatron_taopd.convert.arguments import megatron_arguments
from megatron_taopd.convert.full_tensors import full_tensors
from megatron_taopd.convert.hf_reader import HFReader
from megatron_taopd.convert.to_hf import StoredModel, open_stored_model
from megatron_taopd.models.hf_config import HFModelConfig

# Of no consequence for what a model computes.
_NOT_COMPARED = {"raw", "path", "eos_token_ids", "max_position_embeddings", "family"}
_ARGUMENTS_NOT_COMPARED = {
    "ckpt_format",
    "consumed_train_samples",
    "consumed_valid_samples",
    "expert_model_parallel_size",
    "make_vocab_size_divisible_by",
    "max_position_embeddings",
    "padded_vocab_size",
    "pipeline_model_parallel_size",
    "seq_length",
    "skipped_train_samples",
    "tensor_model_parallel_size",
    "vocab_size",
}


@dataclass(frozen=True)
class TensorDifference:
    """A tensor whose values are not those of the original."""

    name: str
    max_difference: float
    share: float
    """Of its values that differ."""
    hint: str
    """What it looks like, or nothing."""

    def __str__(self) -> str:
        text = f"{self.name}: {self.share:.2%} of the values differ, by up to {self.max_difference:.3g}"
        return f"{text}: {self.hint}" if self.hint else text


def compare_settings(original: HFModelConfig, other: HFModelConfig) -> list[str]:
    """Differences between two configurations that change what the model computes."""
    found = []
    for field in dataclasses.fields(original):
        ours, theirs = getattr(other, field.name), getattr(original, field.name)
        if field.name not in _NOT_COMPARED and ours != theirs:
            found.append(f"{field.name} is {ours!r} in {other.path}, and {theirs!r} in the original {original.path}")
    return found


def compare_arguments(original: HFModelConfig, model: StoredModel) -> list[str]:
    """Differences between the arguments that a Megatron checkpoint keeps and what the original implies."""
    stored = model.reader.common().get("args")
    if stored is None:
        return []
    found = []
    for name, wanted in vars(megatron_arguments(original, original.vocab_size)).items():
        value = getattr(stored, name, wanted)
        if name not in _ARGUMENTS_NOT_COMPARED and value != wanted:
            found.append(f"the stored argument {name} is {value!r}, and the original implies {wanted!r}")
    return found


def compare_tensors(original: HFModelConfig, other: str | Path) -> Iterator[TensorDifference]:
    """The tensors of ``other`` that differ from the original, in the order of the forward pass.

    Tensors of another type are compared after rounding the original to it.

    Raises:
        ModelError, CheckpointError: a tensor is missing, superfluous, misshapen or cannot be read.
    """
    reader = HFReader(original.path)
    for names, shapes, runs in _runs(original, other):
        states = {name: _Comparison(name, shape) for name, shape in zip(names, shapes, strict=True)}
        values = {name: reader.slice(name, shape) for name, shape in zip(names, shapes, strict=True)}
        for name, run in runs:
            first = states[name].rows
            states[name].see(values[name][first : first + run.shape[0]], run)
        for state in states.values():
            if state.different:
                yield state.result(_hint(state, reader, original))


def check_original(original: HFModelConfig) -> int:
    """See that every tensor of the original is there, and no other; returns how many.

    Raises:
        ModelError: it is not so.
    """
    reader = HFReader(original.path)
    wanted = {
        name: shape
        for tensor in full_tensors(original, original.vocab_size)
        for name, shape in zip(tensor.hf_names, tensor.hf_shapes, strict=True)
    }
    for name, shape in wanted.items():
        reader.slice(name, shape)
    reader.refuse_others(set(wanted), tied=original.tied)
    return len(wanted)


_Runs = tuple[tuple[str, ...], tuple[tuple[int, ...], ...], Iterator[tuple[str, torch.Tensor]]]


def _runs(original: HFModelConfig, other: str | Path) -> Iterator[_Runs]:
    """For each Megatron tensor the names and shapes of its HF tensors, and their values as runs of rows."""
    if is_megatron_checkpoint(other):
        model = open_stored_model(other, original.path)
        for tensor, part in model.tensors:
            yield tensor.hf_names, tensor.hf_shapes, model.hf_values(tensor, part)
        return
    reader = HFReader(Path(other))
    for tensor in full_tensors(original, original.vocab_size):
        slices = {n: reader.slice(n, shape) for n, shape in zip(tensor.hf_names, tensor.hf_shapes, strict=True)}
        yield tensor.hf_names, tensor.hf_shapes, ((name, stored[:]) for name, stored in slices.items())


class _Comparison:
    """Of one tensor, run by run."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape
        self.rows = self.different = 0
        self.max_difference = 0.0
        self.value: torch.Tensor | None = None
        """The other's tensor, if it came in one run."""

    def see(self, original: torch.Tensor, other: torch.Tensor) -> None:
        rounded = original.to(other.dtype)
        self.rows += other.shape[0]
        self.value = other if other.shape == self.shape else None
        if torch.equal(rounded, other):
            return
        self.different += int((rounded != other).sum())
        difference = (rounded.float() - other.float()).abs().max().item()
        self.max_difference = difference if math.isnan(difference) else max(self.max_difference, difference)

    def result(self, hint: str) -> TensorDifference:
        share = self.different / torch.Size(self.shape).numel()
        return TensorDifference(self.name, self.max_difference, share, hint)


def _hint(state: _Comparison, reader: HFReader, original: HFModelConfig) -> str:
    """What a wrong tensor looks like: another one, its transpose, or its rows in another order."""
    if state.value is None:
        return ""
    value = state.value
    own = reader.slice(state.name, state.shape)[:].to(value.dtype)
    if len(state.shape) == 2 and state.shape[0] == state.shape[1] and torch.equal(own.T, value):
        return "it is the transpose of the original"
    for name in _neighbours(state, original):
        if torch.equal(reader.slice(name, state.shape)[:].to(value.dtype), value):
            return f"it holds the original's {name}"
    if torch.equal(own.double().sum(-1).sort().values, value.double().sum(-1).sort().values) and value.ndim == 2:
        return "it has the rows of the original in another order"
    return ""


def _neighbours(state: _Comparison, original: HFModelConfig) -> Iterator[str]:
    """Other tensors of the same shape in the same layer."""
    layer = ".".join(state.name.split(".")[:3])
    for tensor in full_tensors(original, original.vocab_size):
        for name, shape in zip(tensor.hf_names, tensor.hf_shapes, strict=True):
            if name.startswith(layer + ".") and name != state.name and shape == state.shape:
                yield name
