"""The answer in a response, by rules that are tried in order; the first that finds something wins."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_taopd.registry import resolve

_PHRASE = re.compile(r"\banswer\b(?:\s+is|\s*[:=])[\s:*]*(?P<answer>\S[^\n]*)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.,])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w)|(?<![\w.])[-+]?\.\d+(?!\w)")


@dataclass(frozen=True)
class Extraction:
    """An answer, and the rule that found it."""

    answer: str
    rule: str


def extract_answer(response: str, rules: Sequence[str], *, thinking: bool = False) -> Extraction | None:
    """The answer in a response, or None if no rule finds one.

    What comes before the last ``</think>`` is never searched. A response whose thoughts do not end has no answer.

    Args:
        rules: names in :data:`RULES`, or functions of one's own as ``pkg.module:function`` (text to answer or None).
        thinking: the prompt has opened the thoughts.

    Raises:
        ConfigError: there is no such rule.
    """
    _, closed, text = response.rpartition("</think>")
    if not closed and (thinking or "<think>" in response):
        return None
    for name in rules:
        found = resolve("--extract rule", name, RULES)(text)
        if found is not None and found.strip():
            return Extraction(found.strip(), name)
    return None


def answer_tag(text: str) -> str | None:
    """Inside the last ``<answer>…</answer>``."""
    before, closed, _ = text.rpartition("</answer>")
    _, opened, answer = before.rpartition("<answer>")
    return answer if closed and opened else None


def boxed(text: str) -> str | None:
    r"""Inside the last ``\boxed{…}`` whose braces close."""
    for match in reversed(list(re.finditer(r"\\f?box(?:ed)?\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            # an escaped brace is a character of the answer
            if text[end] in "{}" and text[end - 1] != "\\":
                depth += 1 if text[end] == "{" else -1
            if depth == 0:
                return text[match.end() : end]
    return None


def final_answer(text: str) -> str | None:
    """The rest of the line after the last "answer is" or "answer:", without a full stop or emphasis."""
    matches = list(_PHRASE.finditer(text))
    return _bare(matches[-1]["answer"]) if matches else None


def last_line(text: str) -> str | None:
    """The last line that is not blank, without a full stop or emphasis."""
    lines = [line for line in text.splitlines() if line.strip()]
    return _bare(lines[-1]) if lines else None


def last_number(text: str) -> str | None:
    """The last number in decimal digits, without commas between thousands."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def whole(text: str) -> str | None:
    """All of it."""
    return text


RULES: dict[str, Callable[[str], str | None]] = {
    "answer_tag": answer_tag,
    "boxed": boxed,
    "final_answer": final_answer,
    "last_line": last_line,
    "last_number": last_number,
    "whole": whole,
}


def _bare(text: str) -> str:
    return text.strip().strip("*").removesuffix(".").strip("*").strip()
