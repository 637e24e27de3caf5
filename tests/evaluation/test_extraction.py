"""Answers found in hand-made responses."""

from __future__ import annotations

import pytest

from megatron_taopd.errors import ConfigError
from megatron_taopd.evaluation.extraction import RULES, extract_answer

CASES: list[tuple[str, str, str | None]] = [
    ("answer_tag", "<answer>1</answer> no: <answer> 12\n</answer>.", "12"),
    ("answer_tag", "so <answer> maybe <answer>7</answer>", "7"),
    ("answer_tag", "<answer>3</answer> and then <answer>4", "3"),
    ("answer_tag", "<answer>cut", None),
    ("answer_tag", "</answer>", None),
    ("boxed", r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    ("boxed", r"\boxed{ \text{a \} brace} }", r"\text{a \} brace}"),
    ("boxed", r"\fbox{5}", "5"),
    ("boxed", r"done \boxed{2} cut off \boxed{\frac{1}{", "2"),
    ("boxed", r"\boxed 5", None),
    ("final_answer", "The answer is 3.\nThe final answer is: **12**.\n", "12"),
    ("final_answer", "Answer: (C) because", "(C) because"),
    ("final_answer", "ANSWER = 4", "4"),
    ("final_answer", "The answer is simple\nAnswer: x", "x"),
    ("final_answer", "unanswered: 4", None),
    ("final_answer", "The answer is", None),
    ("last_line", "one\n\n  **two.**  \n \n", "two"),
    ("last_line", " \n", None),
    ("last_number", "7 + 5 = 12, so 1,234.50 apples", "1234.50"),
    ("last_number", "from 3 to -4.", "-4"),
    ("last_number", "about .5", ".5"),
    ("last_number", "x2 and v1.2a", None),
    ("last_number", "3,4 and 5", "5"),
    ("whole", " a\nb ", "a\nb"),
    ("whole", " ", None),
]


@pytest.mark.parametrize(("rule", "response", "wanted"), CASES)
def test_rules(rule: str, response: str, wanted: str | None) -> None:
    found = extract_answer(response, [rule])
    assert (None if found is None else found.answer) == wanted


def test_every_rule_has_a_case() -> None:
    assert {rule for rule, _, _ in CASES} == set(RULES)


def test_the_first_rule_that_finds_something_wins() -> None:
    response = "12\n<answer> </answer> \\boxed{}\n13"
    found = extract_answer(response, ["answer_tag", "boxed", "last_line", "whole"])
    assert found is not None and (found.answer, found.rule) == ("13", "last_line")


def shout(text: str) -> str:
    return text.upper()


def test_a_rule_of_ones_own() -> None:
    found = extract_answer("abc", ["boxed", f"{__name__}:shout"])
    assert found is not None and found.answer == "ABC"
    with pytest.raises(ConfigError, match="unknown --extract rule 'box'; did you mean 'boxed'"):
        extract_answer("abc", ["box"])


@pytest.mark.parametrize(
    ("response", "opened_by_prompt", "wanted"),
    [
        ("<think>\\boxed{1}</think> \\boxed{2}", False, "2"),
        ("\\boxed{1}</think> \\boxed{2}", True, "2"),
        ("\\boxed{1}</think> nothing", True, None),
        ("<think>\\boxed{1}", False, None),
        ("\\boxed{1}", True, None),
        ("\\boxed{1}", False, "1"),
    ],
)
def test_thoughts_are_not_searched(response: str, opened_by_prompt: bool, wanted: str | None) -> None:
    found = extract_answer(response, ["boxed"], thinking=opened_by_prompt)
    assert (None if found is None else found.answer) == wanted
