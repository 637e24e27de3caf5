"""An LM head in FP8: e4m3 numbers with one scale a row of weights and a row of hidden states, multiplied in FP8.

Scales are current, from the values that are scaled and nothing else. A few columns of the head stay out of FP8: final
hidden states have channels that outweigh all others, and the error of FP8 is that of the largest terms of a sum.

Shapes: R rows, H hidden size, V ids of this shard that exist in the real vocabulary, E columns that stay exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_taopd.errors import ConfigError
from megatron_taopd.ops.collectives import all_reduce_sum
from megatron_taopd.ops.head import HeadShard
from megatron_taopd.ops.tiles import slices

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
FP8_CAPABILITY = (8, 9)
"""Oldest CUDA compute capability whose tensor cores multiply FP8 numbers: Ada; Hopper is 9.0, Blackwell 10.0."""

EXACT_COLUMNS = 32
"""Columns that stay out of FP8, at most (and at most an eighth of all)."""

_MULTIPLE = 16  # CUDA's FP8 product wants both sides of the weights to be multiples of it
_ROWS_AT_ONCE = 4096  # of the head that are held in fp32 while they are scaled


def quantize_rows(values_RH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as e4m3 numbers, scaled so that the largest of a row becomes 448.

    Returns:
        The numbers [R, H] and the fp32 factors [R] that undo the scaling. A row of zeros has factor 1.
    """
    values = values_RH.detach().float()
    amax_R1 = values.abs().amax(-1, keepdim=True) if values.shape[-1] else values.new_zeros(values.shape[0], 1)
    scale_R1 = torch.div(E4M3_MAX, amax_R1)
    # So small a maximum that its scale overflows takes the largest scale that the input's type can tell.
    scale_R1 = scale_R1.where(scale_R1 != torch.inf, min(torch.finfo(values_RH.dtype).max, torch.finfo().max))
    scale_R1 = scale_R1.where(amax_R1 != 0, 1.0)
    return (values * scale_R1).to(E4M3), scale_R1.reciprocal()[:, 0]


@dataclass(frozen=True)
class Fp8Head(HeadShard):
    """A shard whose :meth:`logits` come from FP8 numbers; made once for each version of the weights."""

    numbers: torch.Tensor = field(kw_only=True)
    """e4m3 [V, H], both rounded up to multiples of 16 with zeros."""
    scale_V: torch.Tensor = field(kw_only=True)
    """fp32; undoes the scaling of each row."""
    energy_H: torch.Tensor = field(kw_only=True)
    """fp32; sum of squares of each column over the whole vocabulary."""

    @classmethod
    def of(cls, head: HeadShard) -> Fp8Head:
        """The same shard in FP8. It keeps the exact weights as well, for single ids and the columns that stay exact.

        All ranks of the group call it: one all-reduce of H numbers.

        Raises:
            ConfigError: on a CUDA device that has no FP8 units.
        """
        refuse_without_fp8_units(head.weight.device)
        weight_VH = head.valid_weight()
        numbers = torch.zeros(*map(_rounded_up, weight_VH.shape), dtype=E4M3, device=weight_VH.device)
        scale_V = torch.empty(weight_VH.shape[0], dtype=torch.float32, device=weight_VH.device)
        energy_H = torch.zeros(weight_VH.shape[1], dtype=torch.float32, device=weight_VH.device)
        for rows in slices(weight_VH.shape[0], _ROWS_AT_ONCE):
            numbers[rows, : weight_VH.shape[1]], scale_V[rows] = quantize_rows(weight_VH[rows])
            energy_H += weight_VH[rows].float().square().sum(0)
        return cls(
            head.weight,
            head.vocab_start,
            head.vocab_size,
            head.group,
            numbers=numbers,
            scale_V=scale_V,
            energy_H=all_reduce_sum(energy_H, head.group),
        )

    @property
    def num_bytes(self) -> int:
        """Memory of the FP8 numbers and their scales, beside the exact weights."""
        return self.numbers.numel() + 4 * self.scale_V.numel()

    def logits(
        self,
        hidden_RH: torch.Tensor,
        temperature: float = 1.0,
        *,
        columns: slice = slice(None),
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [R, V] of this shard over the temperature from the FP8 product, as :attr:`logits_dtype`."""
        start, stop, _ = columns.indices(self.num_valid)
        if out is None:
            out = hidden_RH.new_empty(hidden_RH.shape[0], stop - start, dtype=self.logits_dtype)
        if not out.numel():
            return out
        hidden_RH = hidden_RH.detach()
        columns_E = self.exact_columns(hidden_RH)
        exact = HeadShard(self.valid_weight()[start:stop].index_select(1, columns_E), 0, stop - start)
        numbers_RH, scale_R = quantize_rows(hidden_RH.index_fill(1, columns_E, 0.0))
        missing = self.numbers.shape[1] - numbers_RH.shape[1]
        if missing:
            numbers_RH = torch.cat([numbers_RH, numbers_RH.new_zeros(numbers_RH.shape[0], missing)], dim=1)
        product_RW = _product(numbers_RH, self.numbers[start : start + _rounded_up(stop - start)])[:, : stop - start]
        exact.logits(hidden_RH.index_select(1, columns_E), out=out)
        out.addcmul_(product_RW.mul_(scale_R[:, None]), self.scale_V[start:stop])
        return out if temperature == 1.0 else out.div_(temperature)

    def exact_columns(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """The columns [E] that add most to the logits of these rows, the same on every rank."""
        energy_H = hidden_RH.float().square().mean(0) * self.energy_H
        return energy_H.topk(min(EXACT_COLUMNS, energy_H.numel() // 8)).indices


def refuse_without_fp8_units(device: torch.device) -> None:
    """CPUs emulate FP8, CUDA devices must have it.

    Raises:
        ConfigError: a CUDA device has no FP8 units.
    """
    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < FP8_CAPABILITY:
        raise ConfigError(
            f"--score-head-precision fp8 needs compute capability {'.'.join(map(str, FP8_CAPABILITY))} or higher and "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, found))}; use --score-head-precision model"
        )


def _rounded_up(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE


def _product(numbers_RH: torch.Tensor, numbers_WH: torch.Tensor) -> torch.Tensor:
    """[R, W] of e4m3 numbers, added up and returned in fp32 without any scale.

    Scales of rows are applied afterwards: with them in the product, CUDA returns bf16, whose steps at a logit of 20 are
    as wide as the error of FP8 itself.
    """
    one = torch.ones((), dtype=torch.float32, device=numbers_RH.device)
    # Of 4 K candidates each is computed again: the product may add up the fast way.
    return torch._scaled_mm(
        numbers_RH, numbers_WH.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True
    )
