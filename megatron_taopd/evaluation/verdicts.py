"""Whether an answer is right: one scorer a kind of task."""

from __future__ import annotations

import logging
import re
import signal
import string
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_taopd.errors import ConfigError, DataError
from megatron_taopd.evaluation.extraction import extract_answer
from megatron_taopd.evaluation.options import CHOICE, REASONING_GYM
from megatron_taopd.evaluation.problems import Problem, generator
from megatron_taopd.registry import resolve

if TYPE_CHECKING:
    from megatron_taopd.evaluation.tasks import Task

Scorer = Callable[[str, Problem], float]
# Scorers of a library compute with whatever a model has written.
TIME_LIMIT = 10.0
_LETTERS = (
    # alone, then with a mark and text behind it
    re.compile(r"(?:(?:option|choice|answer)\s+)?[(\[{]?(?P<letter>[a-z])[)\]}]?[.:,]?", re.IGNORECASE),
    re.compile(r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s+)?(?P<letter>[A-Z])[.:)]\**\s.*", re.DOTALL),
    re.compile(r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s+)?[(\[](?P<letter>[A-Za-z])[)\]]\**\s.*", re.DOTALL),
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found in a response, and what it is worth."""

    answer: str | None
    """None: no rule found one."""
    rule: str | None
    score: float
    """From 0 to 1."""
    error: str | None = None
    """Why the scorer failed, if it did; the score is 0 then."""

    @property
    def correct(self) -> bool:
        """Whether the score is the full one, up to rounding."""
        return self.score >= 1 - 1e-6


class Judge:
    """Reads responses to the problems of a task."""

    def __init__(self, task: Task) -> None:
        """Set up.

        Raises:
            ConfigError: a library that the kind needs is missing, or a scorer of one's own cannot be imported.
        """
        self.rules = task.settings.extract
        self.score = scorer_of(task)

    def __call__(self, response: str, problem: Problem, *, thinking: bool = False) -> Verdict:
        """The verdict on a response.

        Args:
            thinking: the prompt has opened the thoughts.
        """
        found = extract_answer(response, self.rules, thinking=thinking)
        if found is None:
            return Verdict(answer=None, rule=None, score=0.0)
        try:
            with _time_limit(TIME_LIMIT):
                score = float(self.score(found.answer, problem))
            error = None if 0 <= score <= 1 + 1e-6 else f"the score is {score}, not from 0 to 1"
        except Exception as failure:  # whatever a scorer runs into
            error = f"{type(failure).__name__}: {failure}"
        return Verdict(answer=found.answer, rule=found.rule, score=0.0 if error else score, error=error)


def scorer_of(task: Task) -> Scorer:
    """The scorer of a task's kind.

    Raises:
        ConfigError: as :class:`Judge`.
    """
    if task.kind == REASONING_GYM:
        dataset = generator(task.source, task.settings)
        return lambda answer, problem: dataset.score_answer(answer, problem.entry)
    return resolve("kind of task", task.kind, {"math": score_math, CHOICE: score_choice, "exact": score_exact})


def check_golds(kind: str, problems: Sequence[Problem], source: str) -> None:
    """Refuse right answers that the scorer cannot read.

    Raises:
        DataError: one cannot.
        ConfigError: math-verify is missing.
    """
    if kind != "math":
        return
    parse, _ = _math_verify()
    for problem in problems:
        if not parse(_as_latex(problem.gold)):
            raise DataError(f"{source}: problem {problem.id!r}: math-verify cannot read the answer {problem.gold!r}")


def score_exact(answer: str, problem: Problem) -> float:
    """1 for the same text up to white space."""
    return float(_squeezed(answer) == _squeezed(problem.gold))


def score_choice(answer: str, problem: Problem) -> float:
    """1 for the right letter."""
    return float(letter_of(answer, problem.choices) == problem.gold)


def score_math(answer: str, problem: Problem) -> float:
    """1 for an equal expression, as math-verify judges it.

    An answer is read as LaTeX if it looks like that or is no sentence; otherwise math-verify looks for the expression
    in it.
    """
    if _squeezed(answer) == _squeezed(problem.gold):
        return 1.0
    parse, verify = _math_verify()
    prose = " " in answer and re.search(r"[A-Za-z]{2,}", answer) and "\\" not in answer
    return float(verify(parse(_as_latex(problem.gold)), parse(answer if prose else _as_latex(answer))))


def letter_of(answer: str, choices: Sequence[str]) -> str | None:
    """The letter that an answer means: C, (C), "C. text", "Option C", the text of a choice, or the only (C) in it."""
    letters = string.ascii_uppercase[: len(choices)]
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", answer).strip(" $*`\n\t")
    for pattern in _LETTERS:
        match = pattern.fullmatch(text)
        if match and match["letter"].upper() in letters:
            return match["letter"].upper()
    same = [i for i, choice in enumerate(choices) if _squeezed(choice).casefold() == _squeezed(text).casefold()]
    if len(same) == 1:
        return letters[same[0]]
    named = set(re.findall(r"\(([A-Z])\)", text))
    return named.pop() if len(named) == 1 and named <= set(letters) else None


def _math_verify() -> tuple[Callable[..., list], Callable[..., bool]]:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError(
            "tasks of kind math need math-verify, which is not installed: pip install -e '.[eval]'"
        ) from error
    if threading.current_thread() is threading.main_thread():
        return parse, verify
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of what is asked for here
    return (lambda text: parse(text, parsing_timeout=None)), (lambda a, b: verify(a, b, timeout_seconds=None))


def _as_latex(text: str) -> str:
    return text if "$" in text or "\\boxed" in text else f"\\boxed{{{text}}}"


def _squeezed(text: str) -> str:
    return " ".join(text.split())


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread after a while; elsewhere there is no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"no verdict within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
