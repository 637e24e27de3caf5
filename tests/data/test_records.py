"""Recorded rollouts: what is written is read back, and each kind of bad line is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_taopd.data.records import Rollout, read_rollouts, write_rollouts
from megatron_taopd.errors import DataError

GOOD = {"id": "a", "prompt_tokens": [5, 6], "response_tokens": [7, 8, 9]}


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_round_trip(tmp_path: Path) -> None:
    rollouts = [
        Rollout(
            id="a/0",
            prompt_tokens=[5],
            response_tokens=[7, 2],
            response_logprobs=[-0.5, 0.0],
            finish_reason="stop",
            messages=[{"role": "user", "content": "größe"}],
            response="sieben",
            extra={"answer": 7, "meta": {"k": [1]}},
        ),
        Rollout(id="b", prompt_tokens=[5], response_tokens=[7], response_logprobs=[-1.0], finish_reason="length"),
    ]
    path = tmp_path / "deep" / "r.jsonl"
    write_rollouts(path, rollouts)
    assert read_rollouts(path) == rollouts
    assert list(path.parent.iterdir()) == [path]
    line = json.loads(path.read_text().splitlines()[1])
    assert set(line) == {"id", "prompt_tokens", "response_tokens", "response_logprobs", "finish_reason"}


def test_hidden_states_are_neither_written_nor_compared(tmp_path: Path) -> None:
    bare = Rollout(id="a", prompt_tokens=[5], response_tokens=[7, 2])
    with_hidden = Rollout(id="a", prompt_tokens=[5], response_tokens=[7, 2], hidden_TH=torch.ones(2, 3))
    write_rollouts(tmp_path / "r.jsonl", [with_hidden])
    assert with_hidden == bare and read_rollouts(tmp_path / "r.jsonl") == [bare]


def test_token_ids_alone_are_enough(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", GOOD, "", {"prompt_tokens": [1], "response_tokens": [508]})
    first, second = read_rollouts(path, vocab_size=509, max_response_length=3)
    assert first == Rollout(id="a", prompt_tokens=[5, 6], response_tokens=[7, 8, 9])
    assert (second.id, second.finish_reason, second.response_logprobs) == ("1", None, None)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('{"id": "x", "prompt_tok', ("not valid JSON",)),
        ("[1, 2]", ("JSON object", "list")),
        ({"id": "x", "prompt_tokens": [1]}, ("response_tokens", "missing")),
        ({**GOOD, "prompt_tokens": []}, ("prompt_tokens", "empty")),
        ({**GOOD, "response_tokens": []}, ("response_tokens", "empty")),
        ({**GOOD, "response_tokens": [1.5]}, ("response_tokens", "integers")),
        ({**GOOD, "response_tokens": [True]}, ("response_tokens", "integers")),
        ({**GOOD, "response_tokens": "7 8"}, ("response_tokens", "integers")),
        ({**GOOD, "response_tokens": [-1]}, ("-1",)),
        ({**GOOD, "response_tokens": [509]}, ("509", "tokenizer")),
        ({**GOOD, "prompt_tokens": [600]}, ("prompt_tokens", "600", "509")),
        (
            {**GOOD, "id": "long one", "response_tokens": [3] * 5},
            ("long one", "5", "4", "max-response-length"),
        ),
        ({**GOOD, "finish_reason": "eos"}, ("finish_reason", "eos", "stop")),
        ({**GOOD, "response_logprobs": [-1.0]}, ("1", "3", "response_logprobs")),
        ({**GOOD, "response_logprobs": [-1.0, None, -2.0]}, ("response_logprobs", "numbers")),
        ({**GOOD, "response_logprobs": [-1.0, 0.5, -2.0]}, ("0.5", "log-probability")),
        ({**GOOD, "response_logprobs": [-1.0, -1.0, -2.0]}, ("every line", "none")),
        (
            '{"prompt_tokens": [1], "response_tokens": [1, 2, 3], "response_logprobs": [-1, NaN, -1]}',
            ("nan",),
        ),
        ({**GOOD, "prompt": [{"role": "user"}]}, ("prompt", "string", "messages")),
        ({**GOOD, "messages": [{"content": "hi"}]}, ("messages", "role")),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: object, wanted: tuple[str, ...]) -> None:
    path = write_lines(tmp_path / "r.jsonl", GOOD, "", line)
    with pytest.raises(DataError) as refusal:
        read_rollouts(path, vocab_size=509, max_response_length=4)
    message = str(refusal.value)
    assert message.startswith(f"{path}:3: ")
    for word in wanted:
        assert word in message


def test_one_teacher_with_a_name_need_not_be_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", GOOD, {**GOOD, "teacher": "math"})
    assert [r.extra.get("teacher") for r in read_rollouts(path, teachers=["math"])] == [None, "math"]
    with pytest.raises(DataError, match=r"r\.jsonl:1: no 'teacher'.*math, code"):
        read_rollouts(path, teachers=["math", "code"])
    with pytest.raises(DataError, match=r"r\.jsonl:2: 'teacher' is 'math'.*code"):
        read_rollouts(path, teachers=["code"])


def test_bad_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.jsonl"):
        read_rollouts(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n  \n")
    with pytest.raises(DataError, match="empty.jsonl is empty"):
        read_rollouts(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"id": "größe"}'.encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read_rollouts(tmp_path / "latin.jsonl")
