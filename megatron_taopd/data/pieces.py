"""The text of single tokens, so that joined they are the text of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token, special tokens included; one entry a token.

    What a token looks like depends on those before it (spaces of SentencePiece, bytes of one character), so each piece
    is what the text grows by. A token that ends inside a character has ``""``, and the character is in the piece that
    completes it; what is incomplete at the end is in the last piece.
    """
    pieces: list[str] = []
    # Text is settled up to `done`; the tokens from `context` on are decoded again with what follows.
    context, done = 0, 0
    for end in range(1, len(ids) + 1):
        before = _decode(tokenizer, ids[context:done])
        now = _decode(tokenizer, ids[context:end])
        if now.endswith(_INCOMPLETE) and end < len(ids):
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        context, done = done, end
    return pieces


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False)) if ids else ""
