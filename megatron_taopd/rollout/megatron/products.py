"""The product of few rows with the LM head, for which a CPU's matrix library repacks the whole head."""

from __future__ import annotations

import math

import torch

# Rows of the head in a block, where it has so many; found by trial, as are the numbers of rows below.
BLOCK = 128


def logits_of(hidden_BH: torch.Tensor, head_VH: torch.Tensor) -> torch.Tensor:
    """``hidden_BH @ head_VH.T`` [B, V], without a copy of the head.

    On a CPU up to 64 rows take 0.5 to 0.8 of the time of the plain product, up to rounding the same.
    """
    rows, vocab = len(hidden_BH), len(head_VH)
    block = math.gcd(vocab, BLOCK)
    if hidden_BH.device.type != "cpu" or rows == 1 or rows > 64 or block < BLOCK:
        return torch.nn.functional.linear(hidden_BH, head_VH)
    if rows <= 4:
        return torch.mm(head_VH, hidden_BH.t()).t().contiguous()
    blocks = head_VH.view(vocab // block, block, -1).transpose(1, 2)
    return torch.bmm(hidden_BH.expand(len(blocks), -1, -1), blocks).transpose(0, 1).reshape(rows, vocab)
