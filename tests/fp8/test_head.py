"""The FP8 head equals float64 arithmetic on the numbers that it holds, which are the nearest e4m3 ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_taopd.ops import HeadShard
from megatron_taopd.ops.fp8 import Fp8Head, quantize_rows
from tests.needs import FP8_DEVICES

# Tensor cores keep fewer bits of a sum on the way (fast accumulation); FP8 itself is ten times as coarse.
TOLERANCE = {"cpu": 1e-5, "cuda": 2e-2}
E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E4M3_VALUES = E4M3_VALUES[E4M3_VALUES.isfinite()].unique()


def nearest_e4m3(value: float) -> float:
    """By search through all finite numbers of the format; of two equally near ones either may be right."""
    return E4M3_VALUES[(E4M3_VALUES - value).abs().argmin()].item()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rough_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float64: the heaviest eighth of the columns (32 at most) as they are, the others of what FP8 holds."""
    energy = hidden.double().square().mean(0) * weight.double().square().sum(0)
    heaviest = energy.argsort(descending=True)[: min(32, hidden.shape[1] // 8)]
    light = torch.ones(hidden.shape[1], dtype=torch.bool, device=hidden.device)
    light[heaviest] = False
    (a, a_factor), (b, b_factor) = quantize_rows(hidden.where(light, 0.0)), quantize_rows(weight)
    rough = (a.double() * a_factor.double()[:, None]) @ (b.double() * b_factor.double()[:, None]).t()
    return rough + hidden[:, heaviest].double() @ weight[:, heaviest].double().t()


def test_every_number_is_the_nearest_of_its_format() -> None:
    values = random(6, 40) * torch.tensor([1e-6, 0.3, 1.0, 7.0, 1e4, 1e30])[:, None]
    numbers, factor = quantize_rows(values)
    assert numbers.dtype == torch.float8_e4m3fn
    for row, scaled, undo in zip(values.double(), numbers.double(), factor.double(), strict=True):
        assert scaled.abs().max() == 448
        assert undo.item() == pytest.approx(row.abs().max().item() / 448, rel=1e-6)
        for value, number in zip((row / undo).tolist(), scaled.tolist(), strict=True):
            nearest = nearest_e4m3(value)
            assert abs(number - value) <= abs(nearest - value) * (1 + 1e-5) + 1e-5


def test_rows_that_cannot_be_scaled() -> None:
    values = torch.zeros(3, 4)
    values[1, 2] = 1e-38  # 448 / 1e-38 is beyond fp32
    values[2] = torch.tensor([1.0, torch.nan, 2.0, 3.0])
    numbers, factor = quantize_rows(values)
    assert (numbers[0].float() == 0).all() and factor[0] == 1
    assert numbers[1].float()[2] > 0 and factor[1].isfinite()
    assert numbers[2].float().isnan().any(), "what is no number must not turn into one"


@pytest.mark.parametrize("device", FP8_DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("width", "start", "vocab"), [(32, 0, 50), (20, 48, 85), (7, 48, 96)])
def test_logits_are_the_product_of_what_it_holds(
    dtype: torch.dtype, width: int, start: int, vocab: int, device: str
) -> None:
    """Neither 16 nor anything else has to divide the sizes; padded ids are never computed."""
    weight, hidden = random(48, width).to(device, dtype), random(5, width, seed=1).to(device, dtype)
    close = partial(torch.testing.assert_close, rtol=TOLERANCE[device], atol=TOLERANCE[device])
    weight[max(vocab - start, 0) :] = torch.nan
    exact = HeadShard(weight, start, vocab)
    head = Fp8Head.of(exact)
    assert head.num_valid == exact.num_valid == min(vocab - start, 48)
    want = rough_logits(hidden, exact.valid_weight())
    got = head.logits(hidden, 0.7)
    assert got.dtype == exact.logits_dtype
    close(got.double(), want / 0.7)
    for columns in (slice(0, 32), slice(32, head.num_valid), slice(3, 3)):
        out = torch.full((5, columns.stop - columns.start + 2), 9.0, dtype=got.dtype, device=device)
        head.logits(hidden, 0.7, columns=columns, out=out[:, :-2])
        close(out[:, :-2], got[:, columns])
        assert (out[:, -2:] == 9).all()
    error = (got.double() - exact.logits(hidden, 0.7).double()).norm() / exact.logits(hidden, 0.7).double().norm()
    assert 0.005 < error < 0.06, "three bits of mantissa on both sides"


@pytest.mark.parametrize("device", FP8_DEVICES)
def test_a_channel_that_outweighs_all_others_costs_no_precision(device: str) -> None:
    weight, hidden = random(200, 64).to(device), random(9, 64, seed=1).to(device)
    plain = HeadShard(weight, 0, 200)
    outlying = hidden.clone()
    outlying[:, 17] *= 100
    errors = [
        (Fp8Head.of(plain).logits(rows).double() - rows.double() @ weight.double().t()).square().mean().sqrt().item()
        for rows in (hidden, outlying)
    ]
    assert errors[1] < 1.1 * errors[0]


def test_memory_is_a_byte_a_weight() -> None:
    head = Fp8Head.of(HeadShard(random(64, 32), 0, 50))
    assert head.num_bytes == 64 * 32 + 4 * 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_at_single_ids(dtype: torch.dtype) -> None:
    weight, hidden = random(24, 12).to(dtype), random(4, 12, seed=1).to(dtype)
    head = HeadShard(weight, 24, 40)  # ids 24 to 39 are real
    ids = torch.tensor([[24, 39, 23], [40, 30, 31], [24, 24, 47], [25, 26, 27]])
    wanted = torch.ones_like(ids, dtype=torch.bool)
    wanted[3, 1] = False
    want = torch.zeros(4, 3, dtype=torch.float64)
    for row in range(4):
        for slot, id in enumerate(ids[row].tolist()):
            if 24 <= id < 40 and wanted[row, slot]:
                want[row, slot] = hidden[row].double() @ weight[id - 24].double() / 0.7
    torch.testing.assert_close(head.logits_at(hidden, ids, wanted, 0.7).double(), want, rtol=1e-5, atol=1e-5)
