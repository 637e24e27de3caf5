"""Our quantizer equals NVIDIA's own pure-torch one bit by bit: each row is a tensor to it.

It comes from Transformer Engine's wheel, unpacked into a folder that nothing is ever imported from in this process
(``tools/fetch_transformer_engine.sh``, or TAOPD_TE_WHEEL_DIR names another folder).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_taopd.ops.fp8 import quantize_rows
from tests.needs import missing

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TAOPD_TE_WHEEL_DIR", ROOT / "build" / "transformer_engine"))


def rows(dtype: torch.dtype) -> torch.Tensor:
    """Of many sizes, with rows that cannot be scaled and values on the edges of the format."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(40, 64, generator=generator) * torch.logspace(-30, 30, 40)[:, None]
    values[0] = 0
    values[1, 1:] = 0
    values[2] = torch.linspace(-448, 448, 64)
    values[3] = 2.0 ** torch.arange(-40, 24)
    if dtype != torch.float16:
        values[4], values[5] = values[4] * 1e-9, 1e-38
    return values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    if not (FOLDER / "transformer_engine").is_dir():
        missing(f"no wheel of Transformer Engine in {FOLDER}", "tools/fetch_transformer_engine.sh fetches it")
    values = rows(dtype)
    torch.save([row[None] for row in values], tmp_path / "in.pt")
    script = Path(__file__).with_name("reference_quantizer.py")
    subprocess.run([sys.executable, script, FOLDER, tmp_path / "in.pt", tmp_path / "out.pt"], check=True, timeout=120)
    numbers, factor = quantize_rows(values)
    for index, (theirs, their_factor) in enumerate(torch.load(tmp_path / "out.pt")):
        assert torch.equal(numbers[index].view(torch.uint8), theirs[0]), f"row {index}"
        assert torch.equal(factor[index : index + 1].view(torch.int32), their_factor.view(torch.int32)), f"row {index}"
    assert "transformer_engine" not in sys.modules
