"""Prompt files become token ids; the order of a run depends on the seed and the count of consumed prompts."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_taopd.data.config import DataConfig
from megatron_taopd.data.prompts import Prompt, PromptSource, read_prompts
from megatron_taopd.errors import ConfigError, DataError
from tests.data.tokenizers_for_tests import TEMPLATE, word_tokenizer

WORDS = ["one", "two", "quiet"]  # ids 5, 6, 7


def read(path: Path, lines: list[Any], tokenizer: Any = None, **options: Any) -> list[Prompt]:
    file = path / "prompts.jsonl"
    file.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return read_prompts(DataConfig(prompt_data=str(file), **options), tokenizer)


def test_three_kinds_of_line(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "two one"}]
    prompts = read(
        tmp_path,
        [
            {"prompt": "one two", "answer": 3},
            {"id": "chat", "messages": messages},
            {"id": 9, "prompt_tokens": [400, 1], "prompt": "shown, not read"},
        ],
        word_tokenizer(WORDS, chat_template=TEMPLATE),
    )
    assert prompts == [
        Prompt(id="0", tokens=[5, 6], prompt="one two", extra={"answer": 3}),
        Prompt(id="chat", tokens=[3, 6, 5, 4], messages=messages),
        Prompt(id="9", tokens=[400, 1], prompt="shown, not read"),
    ]


def test_template_kwargs_reach_the_template(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(WORDS, chat_template=TEMPLATE)
    lines = [{"messages": [{"role": "user", "content": "one"}]}]
    (quiet,) = read(tmp_path, lines, tokenizer, chat_template_kwargs='{"enable_thinking": false}')
    (loud,) = read(tmp_path, lines, tokenizer, chat_template_kwargs='{"enable_thinking": true}')
    assert (quiet.tokens, loud.tokens) == ([3, 5, 4, 7], [3, 5, 4])
    with pytest.raises(DataError, match="enable_think.*no effect"):
        read(tmp_path, lines, tokenizer, chat_template_kwargs='{"enable_think": false}')
    with pytest.raises(DataError, match="no effect.*messages"):
        read(tmp_path, [{"prompt": "one"}], tokenizer, chat_template_kwargs='{"enable_thinking": false}')


@pytest.mark.parametrize("value", ["{enable_thinking: false}", "[1]", "false"])
def test_template_kwargs_must_be_a_json_object(value: str) -> None:
    with pytest.raises(ConfigError, match="chat-template-kwargs.*JSON"):
        DataConfig(prompt_data="p.jsonl", chat_template_kwargs=value)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="no effect without --prompt-data"):
        DataConfig(chat_template_kwargs="{}")
    with pytest.raises(ConfigError, match="--max-prompt-length 0"):
        DataConfig(prompt_data="p.jsonl", max_prompt_length=0)


def test_long_prompts_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [{"prompt_tokens": [1] * n} for n in (3, 4, 2, 9)]
    logger = logging.getLogger("megatron_taopd")
    logger.propagate, before = True, logger.propagate
    with caplog.at_level(logging.WARNING, logger="megatron_taopd"):
        prompts = read(tmp_path, lines, max_prompt_length=3)
    logger.propagate = before
    assert [(p.id, len(p.tokens)) for p in prompts] == [("0", 3), ("2", 2)]
    assert "2 of 4 prompts" in caplog.text and "longest: 9" in caplog.text
    with pytest.raises(DataError, match="all 4 prompts .* 1 tokens .longest: 9"):
        read(tmp_path, lines, max_prompt_length=1)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ({"text": "one"}, ("'prompt', 'messages' or 'prompt_tokens'",)),
        ({"prompt": "one", "messages": [{"role": "user", "content": "one"}]}, ("both",)),
        ({"prompt": ["one"]}, ("'prompt' must be a string", "messages")),
        ({"prompt": ""}, ("no tokens",)),
        ({"messages": []}, ("messages", "role")),
        ({"messages": [{"role": "user", "content": "one"}]}, ("chat template",)),
        ({"prompt_tokens": []}, ("empty",)),
        ("{", ("not valid JSON",)),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: Any, wanted: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as refusal:
        read(tmp_path, [{"prompt": "one"}, line], word_tokenizer(WORDS))  # no chat template
    message = str(refusal.value)
    assert "prompts.jsonl:2: " in message
    for word in wanted:
        assert word in message


def test_bad_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompts.jsonl is empty"):
        read(tmp_path, [""])
    with pytest.raises(DataError, match="tokenizer.*prompt_tokens"):
        read(tmp_path, [{"prompt": "one"}])
    with pytest.raises(DataError, match="nowhere"):
        read_prompts(DataConfig(prompt_data="/nowhere/p.jsonl"), None)


def test_order_of_a_run() -> None:
    prompts = [Prompt(id=str(i), tokens=[i]) for i in range(7)]
    source = PromptSource(prompts, seed=3)
    run = source.batch(0, 21)
    epochs = [[p.id for p in run[i : i + 7]] for i in (0, 7, 14)]
    for epoch in epochs:
        assert sorted(epoch) == [str(i) for i in range(7)]
    assert len(set(map(tuple, epochs))) == 3 and epochs[0] != sorted(epochs[0])

    # Whatever the batches and wherever a new source picks up, the sequence is the same.
    resumed = PromptSource(prompts, seed=3)
    assert resumed.batch(5, 4) + resumed.batch(9, 12) + resumed.batch(0, 5) == run[5:] + run[:5]
    assert [p.id for p in PromptSource(prompts, seed=4).batch(0, 7)] != epochs[0]

    # The first place of an epoch is not a favourite's: 700 epochs, 100 expected for each prompt.
    firsts = Counter(PromptSource(prompts, seed=s).batch(7 * s, 1)[0].id for s in range(700))
    assert min(firsts.values()) > 60 and max(firsts.values()) < 140
