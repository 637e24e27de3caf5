"""Responses token by token, with what was measured at each: from a run's dumps, or a score table and a tokenizer."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_taopd.data import jsonl
from megatron_taopd.data.pieces import token_pieces
from megatron_taopd.data.records import Rollout
from megatron_taopd.errors import DataError
from megatron_taopd.report.scales import number, share
from megatron_taopd.report.score_tables import ScoreTable
from megatron_taopd.report.series import sample_evenly

LEVELS = 10
MEASURES = ("score", "D_norm", "C_norm", "H_norm")


@dataclass(kw_only=True)
class Token:
    """A position of a response, ready for the page."""

    text: str
    breaks: int
    """Line breaks after the token."""
    keep: bool
    levels: str
    """Class names of its colours: ``s3 d9 c0 h5``, levels of score, D̃, C̃ and H̃ from 0 to 9."""
    title: str
    """What is measured here."""


@dataclass(kw_only=True)
class Text:
    """A response."""

    title: str
    prompt: str
    tokens: list[Token]
    left_out: int
    """Positions after those shown."""
    positions: int
    kept: int


@dataclass(kw_only=True)
class TextGroup:
    """Responses of one source."""

    title: str
    note: str
    texts: list[Text]


def texts_of_dumps(log_dir: Path, *, most_responses: int, most_tokens: int) -> list[TextGroup]:
    """Kept-token dumps of a run: the first, one half way and the last.

    Raises:
        DataError: a dump is malformed.
    """
    files = sorted((log_dir / "kept_tokens").glob("iter_*.jsonl"))
    chosen = sorted({0, len(files) // 2, len(files) - 1}) if files else []
    return [_dump(files[i], len(files), most_responses, most_tokens) for i in chosen]


def _dump(path: Path, files: int, most_responses: int, most_tokens: int) -> TextGroup:
    lines = list(jsonl.read_objects(path, what="kept tokens"))
    first = lines[0][1]
    shown = [lines[i] for i in sample_evenly(len(lines), most_responses)]
    texts = [_from_dump(line, where, most_tokens) for where, line in shown]
    asked = first.get("keep_ratio_asked")
    note = f"Selector {first.get('selector')}, budget {share(asked)}." if asked is not None else ""
    if files > 3:
        note += f" The run wrote {files} such steps; the first, the middle and the last are shown."
    return TextGroup(title=f"Iteration {first.get('iteration')}", note=note.strip(), texts=texts)


def _from_dump(line: dict[str, Any], where: str, most_tokens: int) -> Text:
    ids = jsonl.token_ids(line.get("token_ids"), where, "token_ids")
    pieces = line.get("pieces") or [f"⟨{token}⟩" for token in ids]
    columns = {name: line.get(name) or [None] * len(ids) for name in (*MEASURES, "D", "C", "H", "kl_forward")}
    keep = line.get("keep", [])
    wrong = [name for name, values in {**columns, "pieces": pieces, "keep": keep}.items() if len(values) != len(ids)]
    if wrong:
        raise DataError(f"{where}: {', '.join(wrong)} must have one entry a token, {len(ids)}")
    teacher = f", read by {line['teacher']}" if "teacher" in line else ""
    return _text(
        title=f"{line.get('id')}{teacher}",
        prompt=str(line.get("prompt") or _ids_as_text(line.get("prompt_tokens") or [])),
        pieces=[str(piece) for piece in pieces],
        columns=columns,
        keep=[bool(k) for k in keep],
        most_tokens=most_tokens,
    )


def texts_of_table(
    table: ScoreTable,
    tokenizer: Any | None,
    rollouts: Sequence[Rollout],
    *,
    most_responses: int,
    most_tokens: int,
) -> TextGroup:
    """Responses of a score table, evenly spaced over it.

    Args:
        tokenizer: None shows ids.
        rollouts: for the prompts; may be empty.
    """
    starts = [i for i, name in enumerate(table.ids) if i == 0 or name != table.ids[i - 1]]
    ends = [*starts[1:], len(table)]
    prompts = {rollout.id: _prompt(rollout, tokenizer) for rollout in rollouts}
    texts = []
    chosen = sample_evenly(len(starts), most_responses)
    for start, end in ((starts[i], ends[i]) for i in chosen):
        rows = slice(start, end)
        ids = table["token_id"][rows].tolist()
        texts.append(
            _text(
                title=table.ids[start],
                prompt=prompts.get(table.ids[start], ""),
                pieces=_pieces(tokenizer, ids),
                columns={name: table[name][rows].tolist() for name in (*MEASURES, "D", "C", "H", "kl_forward")},
                keep=table.keep[rows].tolist(),
                most_tokens=most_tokens,
            )
        )
    note = f"{len(chosen)} of {len(starts)} responses, evenly spaced." if len(chosen) < len(starts) else ""
    if tokenizer is None:
        note += " Token ids: there is no tokenizer; give --tokenizer for text."
    return TextGroup(title=f"Score table {table.name}", note=note.strip(), texts=texts)


def _text(
    *,
    title: str,
    prompt: str,
    pieces: Sequence[str],
    columns: dict[str, list[Any]],
    keep: Sequence[bool],
    most_tokens: int,
) -> Text:
    tokens = [
        _token(piece, {name: values[i] for name, values in columns.items()}, keep[i])
        for i, piece in enumerate(pieces[:most_tokens])
    ]
    return Text(
        title=visible(title),
        prompt=visible(prompt),
        tokens=tokens,
        left_out=max(0, len(pieces) - most_tokens),
        positions=len(pieces),
        kept=sum(keep),
    )


def _token(piece: str, values: dict[str, Any], keep: bool) -> Token:
    body = piece.rstrip("\n")
    breaks = len(piece) - len(body)
    levels = " ".join(f"{letter}{_level(values[name])}" for letter, name in zip("sdch", MEASURES, strict=True))
    title = " · ".join(
        f"{label} {number(_number(values[name]))}"
        for label, name in (("D", "D"), ("C", "C"), ("H", "H"), ("KL", "kl_forward"), ("score", "score"))
    )
    text = visible(body).replace("\n", "↵") + "↵" * breaks
    return Token(text=text or "·", breaks=breaks, keep=keep, levels=levels, title=title)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _level(value: Any) -> int:
    """0 to 9; what is no number, or negative (a selector's "not here"), is 0."""
    value = _number(value)
    return min(LEVELS - 1, max(0, int(value * LEVELS))) if math.isfinite(value) else 0


# Formatting characters that change how the rest of a page reads: direction overrides, isolates, invisible joiners.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)


def visible(text: str) -> str:
    """Text with control and direction characters spelled out, since a model may write any, and without lone surrogates,
    which no file can hold."""
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    return _CONTROL.sub(lambda match: f"⟨{_name(match[0])}⟩", text)


def _name(character: str) -> str:
    return unicodedata.name(character, f"U+{ord(character):04X}").lower()


def _prompt(rollout: Rollout, tokenizer: Any | None) -> str:
    if tokenizer is not None:
        return str(tokenizer.decode(rollout.prompt_tokens, skip_special_tokens=False))
    if rollout.prompt is not None:
        return rollout.prompt
    if rollout.messages is not None:
        return "\n".join(f"{message['role']}: {message.get('content', '')}" for message in rollout.messages)
    return _ids_as_text(rollout.prompt_tokens)


def _ids_as_text(ids: Sequence[int]) -> str:
    return " ".join(f"⟨{token}⟩" for token in ids)


def _pieces(tokenizer: Any | None, ids: Sequence[int]) -> list[str]:
    return [f"⟨{token}⟩" for token in ids] if tokenizer is None else token_pieces(tokenizer, ids)
