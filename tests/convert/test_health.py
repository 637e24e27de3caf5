"""What one pass over a tensor says of it."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_taopd.convert.health import WeightReport


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_zeros_and_values_that_are_not_finite(dtype: torch.dtype) -> None:
    noise = torch.randn(37, 41, generator=torch.Generator().manual_seed(0)).to(dtype)
    report = WeightReport()
    report.see("fine", noise)
    report.see("negative", -noise.abs())
    report.see("part", noise[:0])
    report.see("zero", noise * 0)
    report.see("bias", noise[0] * 0)
    for name, value in (("nan", math.nan), ("inf", math.inf), ("-inf", -math.inf)):
        for place in (0, 700, -1):
            changed = noise.clone()
            changed.view(-1)[place] = value
            report.see(f"{name} {place}", changed)
    assert report.zero == {"zero"}
    assert report.not_finite == {f"{name} {place}" for name in ("nan", "inf", "-inf") for place in (0, 700, -1)}
    assert "part" not in report.nonzero and {"fine", "negative", "bias"} <= report.nonzero
