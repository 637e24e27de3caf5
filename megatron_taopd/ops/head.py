"""One rank's shard of an LM head, applied to chunks of rows so that [rows, vocabulary] never exists.

Shapes: R rows, H hidden size, V ids of this shard that exist in the real vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_taopd.ops.collectives import Group, group_rank
from megatron_taopd.ops.tiles import slices

DEFAULT_LOGITS_CHUNK_BYTES = 64 * 2**20

_CAST_ROWS = 4096
_CHOSEN_VALUES = {"cpu": 2**20, "cuda": 2**26}  # of weights that are gathered at once: for the cache, or to fill a GPU

# From torch 2.8 on, and on CUDA alone, products of bf16 are written (and added) in fp32 without a copy; elsewhere
# operands are cast first. tests/ops/test_head.py runs it where there is a GPU.
_HAS_OUT_DTYPE = all("dtype_out" in op.overloads() for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


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

    @property
    def logits_dtype(self) -> torch.dtype:
        """fp32, or fp64 for fp64 weights."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def logits(
        self,
        hidden_RH: torch.Tensor,
        temperature: float = 1.0,
        *,
        columns: slice = slice(None),
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [R, V] of this shard over the temperature, without autograd, as :attr:`logits_dtype`.

        Args:
            columns: the ids wanted, counted from the shard's first.
            out: filled and returned.
        """
        weight_VH = self.valid_weight()[columns]
        if out is None:
            out = hidden_RH.new_empty(hidden_RH.shape[0], weight_VH.shape[0], dtype=self.logits_dtype)
        for part in _parts(weight_VH):
            _matmul(hidden_RH.detach(), weight_VH[part].t(), out=out[:, part])
        return out if temperature == 1.0 else out.div_(temperature)

    def logits_at(
        self, hidden_RH: torch.Tensor, ids_RP: torch.Tensor, wanted_RP: torch.Tensor, temperature: float = 1.0
    ) -> torch.Tensor:
        """Logits at single ids from their own rows of the head, over the temperature, as :attr:`logits_dtype`.

        Args:
            ids_RP: int64 ids of the whole vocabulary.
            wanted_RP: bool; the others are not computed.

        Returns:
            [R, P], 0 where the id is another rank's or not wanted: the sum over the group has all that are wanted.
        """
        index_RP = ids_RP - self.vocab_start
        row_L, slot_L = (wanted_RP & (index_RP >= 0) & (index_RP < self.num_valid)).nonzero(as_tuple=True)
        index_L, weight_VH = index_RP[row_L, slot_L], self.valid_weight()
        out = torch.zeros(ids_RP.shape, dtype=self.logits_dtype, device=ids_RP.device)
        for part in slices(row_L.numel(), max(1, _CHOSEN_VALUES[out.device.type] // weight_VH.shape[1])):
            weight_LH = weight_VH.index_select(0, index_L[part]).to(out.dtype)
            hidden_LH = hidden_RH.detach().index_select(0, row_L[part]).to(out.dtype)
            out[row_L[part], slot_L[part]] = torch.linalg.vecdot(weight_LH, hidden_LH)
        return out if temperature == 1.0 else out.div_(temperature)

    def operand(self, grad_logits_RV: torch.Tensor, buffer_RV: torch.Tensor) -> torch.Tensor:
        """The gradient of :meth:`logits` rounded to the weights' type, as every operand of a product is.

        Args:
            buffer_RV: of the gradient's size, and of no more use; it takes what has to be rounded.
        """
        dtype = self.weight.dtype
        if grad_logits_RV.dtype == dtype:
            return grad_logits_RV
        rounded = buffer_RV.view(dtype).flatten()[: grad_logits_RV.numel()]
        return rounded.view(grad_logits_RV.shape).copy_(grad_logits_RV)

    def hidden_gradient(self, grad_logits_RV: torch.Tensor) -> torch.Tensor:
        """[R, H] behind :meth:`logits`, partial over the shards: the sum over the group is the gradient.

        Args:
            grad_logits_RV: of the weights' type; see :meth:`operand`.
        """
        weight_VH = self.valid_weight()
        first, *others = _parts(weight_VH) if self.num_valid else (slice(0, 0),)
        total_RH = _matmul(grad_logits_RV[:, first], weight_VH[first])
        for part in others:
            _add_product(total_RH, grad_logits_RV[:, part], weight_VH[part])
        return total_RH

    def add_weight_gradient(
        self, total_VH: torch.Tensor, grad_logits_RV: torch.Tensor, hidden_RH: torch.Tensor
    ) -> None:
        """Add the weight gradient of :meth:`logits` to ``total_VH`` (rows of padding included) in place.

        Args:
            grad_logits_RV: of the weights' type; see :meth:`operand`.
        """
        own_VH = total_VH[: self.num_valid]
        for part in _parts(self.valid_weight()):
            _add_product(own_VH[part], grad_logits_RV[:, part].t(), hidden_RH.detach())

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


def _parts(weight_VH: torch.Tensor) -> Iterator[slice]:
    """Rows of the head that are multiplied at once: all, or few where they have to be cast to fp32 first."""
    num_ids = weight_VH.shape[0]
    casts = weight_VH.dtype not in (torch.float32, torch.float64) and not (_HAS_OUT_DTYPE and weight_VH.is_cuda)
    return slices(num_ids, _CAST_ROWS if casts else max(num_ids, 1))


def _is_written_wide(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the device multiplies these operands into fp32 as they are."""
    return _HAS_OUT_DTYPE and a.is_cuda and a.dtype == b.dtype and a.dtype not in (torch.float32, torch.float64)


def _is_cast(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype != b.dtype or a.dtype not in (torch.float32, torch.float64)


def _matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Product accumulated and returned in fp32, or in fp64 for fp64 operands."""
    if _is_written_wide(a, b):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    if _is_cast(a, b):
        a, b = a.float(), b.float()
    return torch.mm(a, b, out=out)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add what :func:`_matmul` gives to ``total``, which is of its type, in place."""
    if _is_written_wide(a, b):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif _is_cast(a, b):
        total += _matmul(a, b)
    else:
        total.addmm_(a, b)
