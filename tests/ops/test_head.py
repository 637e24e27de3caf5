"""Products of a head's shard: values and gradients against float64, in every type, and what they hold on the way."""

from __future__ import annotations

import pytest
import torch

from megatron_taopd.ops import HeadShard
from tests.traffic import peak_live_bytes

ROWS, WIDTH, PADDED, VOCAB = 6, 16, 9_000, 8_990  # cast in three parts where a type has to be
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def problem(dtype: torch.dtype, device: str) -> tuple[HeadShard, torch.Tensor, torch.Tensor]:
    """A head, hidden states [R, H], and some gradient of the logits [R, V] in the type of logits."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden, grad = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((PADDED, WIDTH), (ROWS, WIDTH), (ROWS, VOCAB))
    )
    head = HeadShard(weight.to(device, dtype), 0, VOCAB)
    return head, hidden.to(device, dtype), grad.to(device, head.logits_dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_equal_float64(dtype: torch.dtype, device: str) -> None:
    """Operands are rounded to the weights' type; what is made of them is not."""
    head, hidden, grad = problem(dtype, device)
    weight, tolerance = head.weight[:VOCAB].double(), 1e-12 if dtype == torch.float64 else 1e-5
    logits = torch.empty(ROWS, VOCAB, dtype=head.logits_dtype, device=device)
    assert head.logits(hidden, out=logits) is logits
    torch.testing.assert_close(logits.double(), hidden.double() @ weight.t(), rtol=tolerance, atol=10 * tolerance)
    tile = torch.full((ROWS, 128), 7.0, dtype=head.logits_dtype, device=device)
    head.logits(hidden, 2.0, columns=slice(64, 164), out=tile[:, :100])
    torch.testing.assert_close(tile[:, :100], logits[:, 64:164] / 2)
    assert (tile[:, 100:] == 7).all()

    rounded = head.operand(grad, logits)
    assert rounded.dtype == dtype and torch.equal(rounded, grad.to(dtype))
    assert rounded.data_ptr() == (grad if dtype == grad.dtype else logits).data_ptr()
    of_hidden = head.hidden_gradient(rounded)
    assert of_hidden.dtype == head.logits_dtype
    want = rounded.double() @ weight
    torch.testing.assert_close(of_hidden.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()))
    total = torch.ones(PADDED, WIDTH, dtype=head.logits_dtype, device=device)
    for _ in range(2):
        head.add_weight_gradient(total, rounded, hidden)
    want = 1 + 2 * rounded.double().t() @ hidden.double()
    torch.testing.assert_close(total[:VOCAB].double(), want, rtol=tolerance, atol=10 * tolerance)
    assert (total[VOCAB:] == 1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, ROWS])
@pytest.mark.parametrize("vocab", [0, VOCAB])
def test_without_rows_or_ids(dtype: torch.dtype, device: str, rows: int, vocab: int) -> None:
    head, hidden, grad = problem(dtype, device)
    head, hidden = HeadShard(head.weight, 0, vocab), hidden[:rows]
    logits = head.logits(hidden)
    assert logits.shape == (rows, vocab)
    rounded = head.operand(grad[:rows, :vocab].contiguous(), logits)
    of_hidden = head.hidden_gradient(rounded)
    assert of_hidden.shape == (rows, WIDTH) and of_hidden.dtype == torch.float32
    assert (of_hidden.abs().sum() > 0) == (rows > 0 and vocab > 0)
    total = torch.ones(PADDED, WIDTH, device=device)
    head.add_weight_gradient(total, rounded, hidden)
    assert ((total - 1).abs().sum() > 0) == (rows > 0 and vocab > 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_products_of_bf16_make_no_copies() -> None:
    """Logits go to their buffer, gradients to the running sum: no fp32 [R, V] or [V, H] exists beside them."""
    head, hidden, grad = problem(torch.bfloat16, "cuda")
    logits = torch.empty(ROWS, VOCAB, device="cuda")
    rounded, total = head.operand(grad, logits.clone()), torch.zeros(PADDED, WIDTH, device="cuda")
    for run in (lambda: head.logits(hidden, out=logits), lambda: head.add_weight_gradient(total, rounded, hidden)):
        run()  # the library's workspace
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        assert torch.cuda.max_memory_allocated() - before < 4 * ROWS * VOCAB / 4


def test_parts_of_the_hidden_gradient_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bf16 is cast, a part's weights and gradient in fp32, its product and the sum exist at once."""
    rows, width, part = 64, 256, 128
    monkeypatch.setattr("megatron_taopd.ops.head._CAST_ROWS", part)
    head = HeadShard(torch.ones(PADDED, width, dtype=torch.bfloat16), 0, PADDED)
    grad = torch.ones(rows, PADDED, dtype=torch.bfloat16)
    assert (head.hidden_gradient(grad) == PADDED).all()
    assert peak_live_bytes(lambda: head.hidden_gradient(grad)) <= 4 * (part * width + rows * part + 2 * rows * width)
