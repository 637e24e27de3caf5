"""SentencePiece tokenizers, trained here: ids as in the library and in transformers, and agreement by ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import LlamaTokenizer

from megatron_taopd.data.config import DataConfig
from megatron_taopd.data.prompts import read_prompts
from megatron_taopd.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_taopd.data.tokenizer import check_tokenizers_agree, load_tokenizer
from megatron_taopd.errors import ModelError, TokenizerMismatchError
from megatron_taopd.testing.tiny_models import save_tiny_hf_model

TEXTS = (
    "the quick brown fox",
    "two  spaces, 12 345 and\n\ta newline",
    " leading and trailing ",
    "Übrigens 日本 🚲",
    "",
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)


def train(directory: Path, words: str, vocab_size: int = 340) -> None:
    """Write ``tokenizer.model``, made as Llama's is: BPE with bytes, spaces kept as they are."""
    directory.mkdir(exist_ok=True)
    sentences = [f"{words} number {number} and {number * 7}" for number in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sentencepiece") / "model"
    train(directory, "the quick brown fox jumps over the lazy dog")
    return directory


@pytest.fixture()
def model(trained: Path, tmp_path: Path) -> Path:
    directory = save_tiny_hf_model(tmp_path / "student", "mistral", hidden_size=16, num_layers=1, ffn_size=16)
    shutil.copyfile(trained / "tokenizer.model", directory / "tokenizer.model")
    return directory


def test_ids_are_those_of_the_library(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    library = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == library.encode(text, add_bos=True)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode([1, *library.encode("the fox"), 2]) == "<s>the fox</s>"
    assert tokenizer.decode([*library.encode("the fox"), 508]) == "the fox"  # an id of the padded vocabulary
    assert len(tokenizer) == 340 and tokenizer.eos_token_id == 2
    assert tokenizer("the fox</s>")["input_ids"] == [*library.encode("the fox", add_bos=True), 2]


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_are_those_of_transformers(trained: Path, tmp_path: Path, legacy: bool) -> None:
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": legacy}
    ours = Path(shutil.copytree(trained, tmp_path / "ours"))
    (ours / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = LlamaTokenizer.from_pretrained(ours)
    tokenizer = SentencePieceTokenizer(ours)
    # Two things transformers 5 has changed: a text that begins with a space gets no second one, as SentencePiece gives
    # it, and `legacy` no longer puts a space after special tokens.
    for text in (*(text for text in TEXTS if not text.startswith(" ")), "" if legacy else "the fox</s>jumps over"):
        assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"], text
    assert tokenizer.get_vocab() == theirs.get_vocab()


def test_legacy_puts_a_space_after_special_tokens(trained: Path, tmp_path: Path) -> None:
    ours = Path(shutil.copytree(trained, tmp_path / "ours"))
    library = sentencepiece.SentencePieceProcessor(model_file=str(ours / "tokenizer.model"))
    wanted = [*library.encode("the fox", add_bos=True), 2]
    assert SentencePieceTokenizer(ours)("the fox</s>jumps")["input_ids"] == wanted + library.encode("jumps")
    (ours / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    assert SentencePieceTokenizer(ours)("the fox</s>jumps")["input_ids"] != wanted + library.encode("jumps")


def test_what_tokenizer_config_says(model: Path, tmp_path: Path) -> None:
    config = {
        "add_bos_token": False,
        "legacy": False,
        "chat_template": TEMPLATE,
        "added_tokens_decoder": {"340": {"content": "<extra>", "special": True}},
    }
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(model)
    plain = tokenizer("the fox")["input_ids"]
    assert plain[0] != 1 and tokenizer("the fox<extra>")["input_ids"] == [*plain, 340]
    assert tokenizer.convert_ids_to_tokens(340) == "<extra>" and tokenizer.convert_ids_to_tokens(341) is None
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"messages": [{"role": "user", "content": "the fox"}]}, {"prompt": "the fox"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chat, text = read_prompts(DataConfig(prompt_data=str(prompts)), tokenizer)
    assert text.tokens == plain
    begin, end = (tokenizer.get_vocab()[name] for name in ("[INST]", "[/INST]"))
    assert chat.tokens[:2] == [1, begin] and chat.tokens[-1] == end
    assert tokenizer.decode(chat.tokens) == "<s>[INST]the fox [/INST]"


def test_no_chat_template(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": "the fox"}]}) + "\n")
    with pytest.raises(ValueError, match="no chat template beside tokenizer.model"):
        read_prompts(DataConfig(prompt_data=str(prompts)), load_tokenizer(model))


def test_not_a_sentencepiece_model(model: Path) -> None:
    (model / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's, as of Llama 3
    with pytest.raises(ModelError, match="tokenizer.model is no SentencePiece model .*Llama 3"):
        load_tokenizer(model)


def test_agreement_is_by_ids(model: Path, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = Path(shutil.copytree(model, tmp_path / "teacher"))
    check_tokenizers_agree(model, teacher)
    # The same vocabulary as a tokenizer.json of transformers, and larger by one token.
    converted = LlamaTokenizer.from_pretrained(trained)
    converted.add_tokens(["<extra>"], special_tokens=True)
    (teacher / "tokenizer.model").unlink()
    converted.save_pretrained(teacher)
    assert (teacher / "tokenizer.json").exists()
    assert not isinstance(load_tokenizer(teacher), SentencePieceTokenizer)
    check_tokenizers_agree(model, teacher)
    check_tokenizers_agree(teacher, model)
    # As many tokens, but others.
    other = save_tiny_hf_model(tmp_path / "other", "mistral", hidden_size=16, num_layers=1, ffn_size=16)
    train(other, "sphinx of black quartz judge my vow")
    assert len(load_tokenizer(other)) == len(load_tokenizer(model))
    with pytest.raises(TokenizerMismatchError, match="of 340 common token ids stand for different tokens"):
        check_tokenizers_agree(model, other)
