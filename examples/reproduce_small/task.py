"""The task: long sums worked out term by term, of which the last two digits count.

It is `chain_sum` of reasoning-gym with four possible terms and modulo 100. The response repeats each term and writes
the running total behind it; the last one is the result. The suites judge it by exact match of the last number
(tasks/*.yaml); a test compares that with reasoning-gym's scorer of `chain_sum` (:func:`score`).

    prompt      then -83 ; then +35 ; from 47         (three tokens a term)
    response    then -83 64 then +35 99               (three tokens a term)

Every number is one token, as two-digit numbers are in many tokenizers: among 109 tokens, sixteen candidates are few.
A token of the response is a `then`, a term (copied from the prompt) or a total (to be looked up). A wrong total is no
dead end: what follows it is right or wrong by itself, and both models can be asked about it.

Modulo 100, -83 does what +17 does and -65 what +35 does. Who can add has all it takes to subtract, but the names.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MODULUS = 100
TERMS = (17, 35, -83, -65)
PAD, EOS = "<pad>", "<eos>"


@dataclass(frozen=True)
class Problem:
    """One sum."""

    start: int
    terms: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """What is asked."""
        return " ; ".join([*(f"then {term:+d}" for term in self.terms), f"from {self.start}"])

    @property
    def answer(self) -> str:
        """The last two digits of the sum, as Python's remainder has them."""
        return str((self.start + sum(self.terms)) % MODULUS)


def problems(stream: int, num_terms: int) -> Iterator[Problem]:
    """An endless stream of sums of a start and ``num_terms`` terms; other streams draw other numbers."""
    chooser = random.Random(f"problems of stream {stream}")
    while True:
        yield Problem(chooser.randrange(MODULUS), tuple(chooser.choices(TERMS, k=num_terms)))


def working(
    problem: Problem, *, jump: float = 0.0, chooser: random.Random | None = None
) -> tuple[list[str], list[str]]:
    """Words of the response, and of each its kind: ``then``, ``term``, ``+`` or ``-`` (a total), ``end``, ``jump``.

    Args:
        jump: share of the totals that are replaced by an arbitrary one, from which the working goes on. Whoever learns
            from such workings can go on after a mistake; the replaced totals themselves are not to be learned.
        chooser: decides where, and what instead.
    """
    words, kinds = [], []
    total = problem.start
    for term in problem.terms:
        total, kind = (total + term) % MODULUS, f"{term:+d}"[0]
        if chooser is not None and chooser.random() < jump:
            total, kind = chooser.randrange(MODULUS), "jump"
        words += ["then", f"{term:+d}", str(total)]
        kinds += ["then", "term", kind]
    return [*words, EOS], [*kinds, "end"]


def response_length(num_terms: int) -> int:
    """Tokens of a right response."""
    return 3 * num_terms + 1


def score(response: str, answer: str) -> float:
    """1 for a response whose last number is the right total, by reasoning-gym's scorer of ``chain_sum``; else 0.

    An independent judge, which the suites do not call.
    """
    import reasoning_gym

    numbers = [word for word in response.split() if word.lstrip("+-").isdigit()]
    last = numbers[-1] if numbers else ""
    is_total = last.isdigit()  # a term has a sign
    return float(is_total and reasoning_gym.get_score_answer_fn("chain_sum")(last, {"answer": answer}) == 1.0)


def vocabulary() -> list[str]:
    """All tokens in the order of their ids."""
    return [PAD, EOS, "then", ";", "from", *(f"{term:+d}" for term in TERMS), *map(str, range(MODULUS))]


def save_tokenizer(path: Path) -> None:
    """An HF tokenizer that splits at white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token=PAD, eos_token=EOS).save_pretrained(path)
