"""Small real tokenizers: words of a list, a few special tokens, and a chat template if wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<unk>", "<eos>", "<user>", "<bot>")
TEMPLATE = (
    "{% for m in messages %}<user> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<bot>{% if enable_thinking is defined and not enable_thinking %} quiet"
    "{% endif %}{% endif %}"
)


def word_tokenizer(words: list[str], *, chat_template: str | None = None) -> Any:
    """Ids: the special tokens from 0, then ``words``."""
    vocab = {token: i for i, token in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template=chat_template,
    )


def save_word_tokenizer(directory: Path, words: list[str], *, chat_template: str | None = None) -> None:
    """Write the files of :func:`word_tokenizer`."""
    word_tokenizer(words, chat_template=chat_template).save_pretrained(directory)
