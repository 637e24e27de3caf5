"""One rank's shard of an LM head, applied to chunks of rows so that [rows, vocabulary] never exists.

Shapes: R rows, H hidden size, V ids of this shard that exist in the real vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_taopd.ops.collectives import Group, group_rank

DEFAULT_LOGITS_CHUNK_BYTES = 256 * 2**20

# torch.mm multiplies bf16 into fp32 from this version on, and on CUDA alone; elsewhere operands are cast first.
_HAS_OUT_DTYPE = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)


@dataclass(frozen=True)
class HeadShard:
    """Rows ``vocab_start ...`` of an LM head; ids from ``vocab_size`` on are padding, never computed."""

    weight: torch.Tensor
    """[padded vocabulary / ranks, H]."""
    vocab_start: int
    """Id of the first row."""
    vocab_size: int
    """Real ids of the whole vocabulary (those common to student and teacher)."""
    group: Group = None
    """Ranks that share the vocabulary; None means that this is all of it."""

    @classmethod
    def for_rank(cls, weight: torch.Tensor, vocab_size: int, group: Group) -> HeadShard:
        """This rank's shard where the padded vocabulary is cut evenly in rank order."""
        return cls(weight, group_rank(group) * weight.shape[0], vocab_size, group)

    @property
    def num_valid(self) -> int:
        """Real ids of this shard; 0 where the shard is padding alone."""
        return min(max(self.vocab_size - self.vocab_start, 0), self.weight.shape[0])

    def valid_weight(self) -> torch.Tensor:
        """[V, H], detached."""
        return self.weight.detach()[: self.num_valid]

    def logits(self, hidden_RH: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Logits [R, V] of this shard over the temperature, without autograd, in fp32 (fp64 for fp64
        weights)."""
        logits_RV = _matmul(hidden_RH.detach(), self.valid_weight().t())
        return logits_RV if temperature == 1.0 else logits_RV.div_(temperature)

    def hidden_gradient(self, grad_logits_RV: torch.Tensor) -> torch.Tensor:
        """[R, H] behind :meth:`logits`, partial over the shards: the sum over the group is the gradient."""
        return _matmul(grad_logits_RV.to(self.weight.dtype), self.valid_weight())

    def add_weight_gradient(
        self, total_VH: torch.Tensor, grad_logits_RV: torch.Tensor, hidden_RH: torch.Tensor
    ) -> None:
        """Add the weight gradient of :meth:`logits` to ``total_VH`` (rows of padding included) in place."""
        grad_VR = grad_logits_RV.to(self.weight.dtype).t()
        own_VH = total_VH[: self.num_valid]
        if grad_VR.dtype == hidden_RH.dtype == total_VH.dtype:
            own_VH.addmm_(grad_VR, hidden_RH.detach())
        else:
            own_VH += _matmul(grad_VR, hidden_RH.detach())

    def chunks(self, num_rows: int, logits_chunk_bytes: int) -> Iterator[slice]:
        """Row slices whose fp32 logits fill at most ``logits_chunk_bytes``; one empty slice without rows.

        The same on every rank of the group, so that their collectives pair up.
        """
        rows = max(1, logits_chunk_bytes // (4 * self.weight.shape[0]))
        for start in range(0, max(num_rows, 1), rows):
            yield slice(start, min(start + rows, num_rows))

    def check_lines_up_with(self, other: HeadShard) -> None:
        """Both models' shards must hold the same ids; anything else is a bug of the caller."""
        mine = (self.vocab_start, self.vocab_size, self.weight.shape[0])
        theirs = (other.vocab_start, other.vocab_size, other.weight.shape[0])
        assert mine == theirs, f"head shards differ (start, real size, rows): {mine} against {theirs}"


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Product accumulated and returned in fp32, or in fp64 for fp64 operands."""
    if a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64):
        return a @ b
    if _HAS_OUT_DTYPE and a.is_cuda and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
