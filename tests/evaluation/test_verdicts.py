"""Verdicts on hand-made answers."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from megatron_taopd.errors import ConfigError, DataError
from megatron_taopd.evaluation import verdicts
from megatron_taopd.evaluation.options import TaskOptions
from megatron_taopd.evaluation.problems import Problem
from megatron_taopd.evaluation.tasks import Task, load_tasks
from megatron_taopd.evaluation.verdicts import Judge, letter_of, score_exact, score_math

MATH = [
    ("12", "12", True),
    ("12", "12.0", True),
    ("12", "13", False),
    ("070", "70", True),
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{1}{2}", r"\frac{2}{4}", True),
    (r"\frac{1}{2}", "1/2", True),
    (r"\frac{1}{2}", "1/3", False),
    ("1234", "1,234", True),
    ("x^2+1", "1+x^2", True),
    ("p-q", "q-p", False),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(\pi/2, 3)", False),
    (r"\text{Evelyn}", "Evelyn", True),
    (r"\text{Evelyn}", "Angela", False),
    ("12", r"12 \text{ cm}", True),
    ("12", "so there are 12 apples", True),
    ("12", "so there are 21 apples", False),
    ("12", "no idea", False),
    ("12", "$12$", True),
]
CHOICES = ("red", "green", "dark blue", "none of (A) to (C)")
LETTERS = [
    ("C", "C"),
    ("c", "C"),
    ("(C)", "C"),
    ("C.", "C"),
    ("**C**", "C"),
    (r"\text{C}", "C"),
    ("Option C", "C"),
    ("C) dark blue", "C"),
    ("(b) green", "B"),
    ("C. because it is", "C"),
    ("Dark  Blue", "C"),
    ("it must be (C), since", "C"),
    ("either (B) or (C)", None),
    ("E", None),
    ("a good question", None),
    ("Blue", None),
    ("", None),
]


@pytest.mark.parametrize(("gold", "answer", "right"), MATH)
def test_math(gold: str, answer: str, right: bool) -> None:
    assert score_math(answer, Problem(id="0", gold=gold)) == right


@pytest.mark.parametrize(("answer", "letter"), LETTERS)
def test_letters(answer: str, letter: str | None) -> None:
    assert letter_of(answer, CHOICES) == letter


def test_exact_is_up_to_white_space() -> None:
    problem = Problem(id="0", gold="1 2\n3 4")
    assert [score_exact(answer, problem) for answer in ("1 2\n3 4", " 1  2 3 4 ", "1 2 34")] == [1, 1, 0]


def generated(name: str, **options: object) -> Task:
    return load_tasks([f"reasoning_gym:{name}"], TaskOptions(size=3, **options))[0]  # type: ignore[arg-type]


def test_reasoning_gym_scores_its_own_answers() -> None:
    # A sum has one answer; of a countdown any formula does, so that only its scorer can tell.
    sums = generated("chain_sum")
    judge = Judge(sums)
    for problem in sums.problems:
        right = judge(f"well\n<answer>{problem.gold}</answer>", problem)
        assert (right.answer, right.score, right.correct) == (problem.gold, 1.0, True)
        wrong = judge(f"<answer>{int(problem.gold) + 1}</answer>", problem)
        assert wrong.score < 1 and not wrong.correct
        # its scorer gives part of a point to an answer with words around it, which is not right
        partly = judge(f"{problem.gold} apples", problem)
        assert 0 < partly.score < 1 and not partly.correct
    countdown = generated("countdown")
    judge = Judge(countdown)
    for problem in countdown.problems:
        entry = problem.entry["metadata"]
        assert judge(f"<answer>{entry['expression']}</answer>", problem).correct
        assert not judge(f"<answer>{entry['target']}</answer>", problem).correct


def test_problems_depend_on_their_seed_alone() -> None:
    first, again, other = (generated("chain_sum", problem_seed=seed) for seed in (4, 4, 5))
    assert first.problems == again.problems and first.problems != other.problems


def test_no_answer_is_wrong() -> None:
    task = generated("chain_sum", extract=["answer_tag"])
    verdict = Judge(task)("12", task.problems[0])
    assert (verdict.answer, verdict.rule, verdict.score, verdict.error) == (None, None, 0.0, None)


def half(answer: str, problem: Problem) -> float:
    if answer == "raise":
        raise ZeroDivisionError("of the scorer")
    if answer == "loop":
        while True:
            pass
    return {"twice": 2.0}.get(answer, 0.5 + 0.5 * (answer == problem.entry["extra"]))


def test_a_scorer_of_ones_own_and_its_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "TIME_LIMIT", 0.2)
    (tmp_path / "p.jsonl").write_text('{"problem": "?", "answer": 1, "extra": "yes"}\n')
    (tmp_path / "t.yaml").write_text(f"kind: {__name__}:half\ndata: {tmp_path}/p.jsonl\nextract: whole\n")
    (task,) = load_tasks([str(tmp_path / "t.yaml")])
    judge = Judge(task)
    found = {answer: judge(answer, task.problems[0]) for answer in ("yes", "no", "raise", "loop", "twice")}
    assert {name: (v.score, v.correct) for name, v in found.items() if v.error is None} == {
        "yes": (1.0, True),
        "no": (0.5, False),
    }
    assert "of the scorer" in (found["raise"].error or "") and found["raise"].score == 0
    assert "no verdict within 0.2 s" in (found["loop"].error or "")
    assert "2.0" in (found["twice"].error or "")


def test_math_outside_the_main_thread() -> None:
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(score_math("0.5", Problem(id="0", gold=r"\frac{1}{2}"))))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_a_right_answer_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "x", "problem": "?", "answer": ""}\n')
    with pytest.raises(DataError, match="problem 'x': math-verify cannot read the answer ''"):
        load_tasks([f"math:{tmp_path}/p.jsonl"])


def test_an_unknown_scorer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"problem": "?", "answer": 1}\n')
    (tmp_path / "t.yaml").write_text(f"kind: no.such:thing\ndata: {tmp_path}/p.jsonl\n")
    with pytest.raises(ConfigError, match="kind of task 'no.such:thing' cannot be imported"):
        load_tasks([str(tmp_path / "t.yaml")])
