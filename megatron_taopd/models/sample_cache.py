"""Keys and values of samples that begin at slots of their own, and the attention that reads them.

B rows of the cache, S slots, G key-value heads of this rank, D head size, L tokens of a forward.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType


class SampleCache(StaticInferenceContext):
    """Megatron's inference context for samples of unequal length whose last tokens share a slot.

    Row b begins at slot ``start_B[b]``, the slots before it are empty, and its position p is slot
    ``start_B[b] + p``: prompts of any lengths are read in one forward, and every decoded token goes to one slot in
    all rows. Megatron's own context counts positions by slots, keeps keys that are not rotated yet, and so rotates
    the whole cache anew for every token; here a key is rotated once, at its sample's position.

    Usage: :meth:`begin` before each forward of the model; between the forwards of prompts and the first decoded
    token :meth:`expand`; :meth:`keep` when samples have ended.
    """

    max_batch_size: int
    max_sequence_length: int

    def __init__(self, start_B: torch.Tensor, num_slots: int) -> None:
        """An empty cache.

        Args:
            start_B: int64; first slot of each row.
            num_slots: slots of a row.
        """
        super().__init__(start_B.numel(), num_slots)
        self.start_B = start_B
        self.first_slot = 0
        self.attention_mask: torch.Tensor | None = None
        self._slots = torch.arange(num_slots, device=start_B.device)
        self._positions_LB = start_B[None]
        self._rotation: tuple[torch.Tensor, torch.Tensor] | None = None

    def begin(self, *, first_row: int, rows: int, slot: int, length: int) -> None:
        """Say what the next forward reads: tokens of ``length`` slots from ``slot``, of some rows.

        It sets :attr:`attention_mask` ([rows, 1, L, slots seen], True where a key is hidden; None where the lengths
        say enough), which the caller hands to the model.
        """
        self.batch_size_offset, self.sequence_len_offset = first_row, slot
        start_B = self.start_B[first_row : first_row + rows]
        self._positions_LB = (self._slots[slot : slot + length, None] - start_B).clamp_min_(0)
        self._rotation = None
        # A prompt's forward sees its own slots only, a decoded token all from the first that any row uses.
        seen = self._slots[slot if length > 1 else self.first_slot : slot + length]
        empty_B1S = seen < start_B[:, None, None]
        if not bool(empty_B1S.any()):
            self.attention_mask = None
        elif length == 1:
            self.attention_mask = empty_B1S[:, None]
        else:
            later_LL = seen[None, :] > seen[:, None]
            # Empty slots see themselves: a row of no keys is not a number, which would spread.
            itself_LL = seen[None, :] == seen[:, None]
            self.attention_mask = ((empty_B1S & ~itself_LL) | later_LL)[:, None]

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, frequencies: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotary embedding of new queries and keys [L, rows, heads, D] at their samples' positions.

        Args:
            frequencies: [at least S, 1, 1, D], radians; both halves alike.
        """
        if self._rotation is None:  # once a forward, not once a layer
            angles = frequencies[self._positions_LB, 0]
            self._rotation = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
        cos, sin = self._rotation
        return _rotate(query, cos, sin), _rotate(key, cos, sin)

    def append(self, layer_number: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep keys and values [L, rows, G, D] of the forward begun; returns all that its queries attend to."""
        if layer_number not in self.key_value_memory_dict:
            self.key_value_memory_dict[layer_number] = tuple(
                # Slots of a head lie side by side, as attention reads them. Hidden ones are read too, so no garbage.
                part.new_zeros(self.max_batch_size, part.shape[2], self.max_sequence_length, part.shape[3])
                for part in (key, value)
            )
        length, rows = key.shape[:2]
        first_row, slot = self.batch_size_offset, self.sequence_len_offset
        seen = []
        for memory_BGSD, part in zip(self.key_value_memory_dict[layer_number], (key, value), strict=True):
            of_rows = memory_BGSD[first_row : first_row + rows]
            of_rows[:, :, slot : slot + length] = part.permute(1, 2, 0, 3)
            seen.append(part if length > 1 else of_rows[:, :, self.first_slot : slot + 1].permute(2, 0, 1, 3))
        return seen[0], seen[1]

    def expand(self, rows: torch.Tensor, num_slots: int) -> None:
        """Make room: new row i has what old row ``rows[i]`` has, and ``num_slots`` slots."""
        used = self.max_sequence_length
        self.start_B = self.start_B[rows]
        self.max_batch_size, self.max_sequence_length = rows.numel(), num_slots
        self._slots = torch.arange(num_slots, device=rows.device)
        self.first_slot = int(self.start_B.min())
        for layer_number, memories in self.key_value_memory_dict.items():
            grown = []
            for memory_BGSD in memories:
                new = memory_BGSD.new_empty(rows.numel(), memory_BGSD.shape[1], num_slots, memory_BGSD.shape[3])
                new[:, :, :used] = memory_BGSD[rows]
                grown.append(new)
            self.key_value_memory_dict[layer_number] = tuple(grown)

    def keep(self, alive_B: torch.Tensor) -> torch.Tensor:
        """Drop rows: rows from the end take the places of those dropped.

        Args:
            alive_B: whether each row in use stays.

        Returns:
            The old row of each row now.
        """
        count = int(alive_B.sum())
        rows = torch.arange(count, device=alive_B.device)
        holes = (~alive_B[:count]).nonzero().flatten()
        rows[holes] = alive_B[count:].nonzero().flatten() + count
        used = slice(self.first_slot, self.sequence_len_offset)
        if holes.numel():
            for memories in self.key_value_memory_dict.values():
                for memory_BGSD in memories:
                    memory_BGSD[holes, :, used] = memory_BGSD[rows[holes], :, used]
        self.start_B = self.start_B[rows]
        self.first_slot = int(self.start_B.min())
        return rows


class CachedSelfAttention(SelfAttention):
    """Megatron's self-attention, which also knows :class:`SampleCache`."""

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Megatron's hook between the projections and attention; the Nones say that nothing is left to rotate."""
        if not isinstance(inference_context, SampleCache):
            return super()._adjust_key_value_for_inference(
                inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
            )
        query, key = inference_context.rotate(query, key, rotary_pos_emb[0])
        key, value = inference_context.append(self.layer_number, key, value)
        if inference_context.attention_mask is not None:
            mask_type = AttnMaskType.arbitrary
        else:
            mask_type = AttnMaskType.causal if query.shape[0] > 1 else AttnMaskType.no_mask
        return query, key, value, None, mask_type, None


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, -1)
    return torch.addcmul(heads * cos, torch.cat((-second, first), -1), sin)
