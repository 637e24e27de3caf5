"""Two tokenizers agree when an id means the same to both; stop tokens are the models'."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from megatron_taopd.data.tokenizer import check_tokenizers_agree, load_tokenizer
from megatron_taopd.errors import ModelError, TokenizerMismatchError
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.data.tokenizers_for_tests import save_word_tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


@pytest.fixture()
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return tuple(
        save_tiny_hf_model(tmp_path / name, "llama", hidden_size=16, num_layers=1, ffn_size=16)
        for name in ("student", "teacher")
    )


@pytest.fixture()
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    logging.getLogger("megatron_taopd").propagate = True
    caplog.set_level(logging.INFO, logger="megatron_taopd")
    return caplog


def set_stop_tokens(directory: Path, value: object) -> None:
    path = directory / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": value}))


def test_load(pair: tuple[Path, Path]) -> None:
    student, _ = pair
    assert load_tokenizer(student) is None
    save_word_tokenizer(student, WORDS)
    assert load_tokenizer(student)("two one")["input_ids"] == [6, 5]
    (student / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="student.*cannot be loaded"):
        load_tokenizer(student)
    with pytest.raises(ModelError, match="nowhere"):
        load_tokenizer(student / "nowhere")


def test_code_of_a_tokenizer_is_not_run(pair: tuple[Path, Path], tmp_path: Path) -> None:
    student, _ = pair
    save_word_tokenizer(student, WORDS)
    (student / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    path = student / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(
        json.dumps({**settings, "tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}})
    )
    try:
        load_tokenizer(student)
    except ModelError:
        pass
    assert not (tmp_path / "ran").exists()


def test_agree(pair: tuple[Path, Path], log: pytest.LogCaptureFixture) -> None:
    student, teacher = pair
    check_tokenizers_agree(student, teacher)  # token ids only
    assert not log.records

    save_word_tokenizer(student, WORDS)
    check_tokenizers_agree(student, teacher)
    assert "teacher's directory has no tokenizer" in log.text

    save_word_tokenizer(teacher, [*WORDS, "nine"])
    check_tokenizers_agree(student, teacher)
    assert "only the teacher's tokenizer knows 1 token ids (13 'nine'" in log.text


def test_ids_that_differ_are_named(pair: tuple[Path, Path]) -> None:
    student, teacher = pair
    save_word_tokenizer(student, WORDS)
    save_word_tokenizer(teacher, [WORDS[0], *WORDS[:0:-1]])
    with pytest.raises(TokenizerMismatchError) as refusal:
        check_tokenizers_agree(student, teacher, allow_stop_token_mismatch=True)
    message = str(refusal.value)
    # The middle word of the reversed seven stays where it was.
    assert "6 of 13 common token ids" in message
    assert "id 6: 'two' for the student, 'eight' for the teacher" in message
    assert "and 1 more" in message and "'one'" not in message


@pytest.mark.parametrize(
    ("student_stops", "teacher_stops", "wanted"),
    [
        (2, 7, ("student stops on 2 ('<eos>')", "teacher on 7 ('three')", "--allow-stop-token-mismatch")),
        ([2, 7], 2, ("2 ('<eos>') and 7 ('three')",)),
    ],
)
def test_stop_tokens_that_differ(
    pair: tuple[Path, Path],
    log: pytest.LogCaptureFixture,
    student_stops: object,
    teacher_stops: object,
    wanted: tuple[str, ...],
) -> None:
    student, teacher = pair
    save_word_tokenizer(student, WORDS)
    set_stop_tokens(student, student_stops)
    set_stop_tokens(teacher, teacher_stops)
    with pytest.raises(TokenizerMismatchError) as refusal:
        check_tokenizers_agree(student, teacher)
    for word in wanted:
        assert word in str(refusal.value)
    check_tokenizers_agree(student, teacher, allow_stop_token_mismatch=True)
    assert "allowed by --allow-stop-token-mismatch" in log.text


def test_order_of_stop_tokens_does_not_matter(pair: tuple[Path, Path]) -> None:
    student, teacher = pair
    set_stop_tokens(student, [7, 2])
    set_stop_tokens(teacher, [2, 7])
    check_tokenizers_agree(student, teacher)


def test_no_stop_token_on_one_side(pair: tuple[Path, Path]) -> None:
    student, teacher = pair
    for file in ("config.json", "generation_config.json"):
        path = student / file
        values = json.loads(path.read_text())
        values.pop("eos_token_id", None)
        path.write_text(json.dumps(values))
    with pytest.raises(TokenizerMismatchError, match="no token at all, the teacher on 2"):
        check_tokenizers_agree(student, teacher)
