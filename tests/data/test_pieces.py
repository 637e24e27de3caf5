"""Text of single tokens."""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_taopd.data.pieces import token_pieces
from megatron_taopd.data.sentencepiece_tokenizer import SentencePieceTokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_character_of_several_tokens_is_in_the_one_that_completes_it() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé\n🙂b")["input_ids"]
    assert token_pieces(tokenizer, ids) == ["a", "", "é", "\n", "", "", "", "🙂", "b"]


def test_a_character_cut_off_at_the_end_is_in_the_last_piece() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("ab🙂")["input_ids"][:-1]
    pieces = token_pieces(tokenizer, ids)
    assert pieces[:4] == ["a", "b", "", ""] and set(pieces[4]) == {"\ufffd"}
    assert len(pieces) == len(ids) and token_pieces(tokenizer, []) == []


def test_spaces_of_sentencepiece_are_kept(tmp_path: Path) -> None:
    model = io.BytesIO()
    text = ["one two three", "two three four", "one four"] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=30, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = SentencePieceTokenizer(tmp_path)
    ids = tokenizer("two one four three", add_special_tokens=False)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == "two one four three"
    assert len(pieces) == len(ids) > 4
