"""SentencePiece models (``tokenizer.model``) read as they are, with the few methods of a tokenizer that we use.

For directories without ``tokenizer.json``. transformers 5 converts such a file on the fly and gets other ids than the
model was trained on: of Mistral's, "Hello" without its leading space mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_taopd.errors import ModelError


class SentencePieceTokenizer:
    """Text to ids and back. Special tokens (control pieces and added tokens) are recognised in text.

    A beginning-of-sequence token is put first if the model has one and ``tokenizer_config.json``, where there is one,
    does not say ``add_bos_token: false``. From that file come added tokens, ``legacy`` and the chat template as well.

    Raises:
        ModelError: the files cannot be read, or ``tokenizer.model`` is no SentencePiece model.
    """

    def __init__(self, directory: str | Path) -> None:
        import sentencepiece

        directory = Path(directory)
        file = directory / "tokenizer.model"
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise ModelError(
                f"{file} is no SentencePiece model (that of Llama 3 is not one: take its tokenizer.json): {error}"
            ) from error
        config = _read_json(directory / "tokenizer_config.json")
        self._names = {index: self._model.id_to_piece(index) for index in range(self._model.get_piece_size())}
        self._special = {
            name: index for index, name in self._names.items() if self._model.is_control(index) or index == self.unk_id
        }
        added = {name: int(index) for name, index in _read_json(directory / "added_tokens.json").items()}
        for index, token in config.get("added_tokens_decoder", {}).items():
            added[token["content"] if isinstance(token, dict) else token] = int(index)
        self._special |= added
        self._names |= {index: name for name, index in added.items()}
        self._pattern = re.compile(
            "(" + "|".join(re.escape(name) for name in sorted(self._special, key=len, reverse=True)) + ")"
        )
        self._add_bos = bool(config.get("add_bos_token", True)) and self.bos_token_id is not None
        self._legacy = bool(config.get("legacy", True))
        self._template = _chat_template(directory, config)

    @property
    def unk_id(self) -> int:
        """What is none of the pieces."""
        return self._model.unk_id()

    @property
    def bos_token_id(self) -> int | None:
        """None if the model has none."""
        return self._model.bos_id() if self._model.bos_id() >= 0 else None

    @property
    def eos_token_id(self) -> int | None:
        """None if the model has none."""
        return self._model.eos_id() if self._model.eos_id() >= 0 else None

    def __len__(self) -> int:
        return len(self._names)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """``input_ids`` of a text."""
        ids = [self._model.bos_id()] if self._add_bos and add_special_tokens else []
        begun = False
        for part in self._pattern.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids += self._continued(part) if begun and not self._legacy else self._model.encode(part)
            begun = begun or bool(part)
        return {"input_ids": ids}

    def _continued(self, text: str) -> list[int]:
        """Ids of a text that does not begin a line, so that no space is put before it."""
        unknown = self._names[self.unk_id]
        return self._model.encode(unknown + text)[len(self._model.encode(unknown)) :]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """Text of ids; ids that no token has give nothing."""
        return "".join(self._texts(ids, skip_special_tokens))

    def _texts(self, ids: list[int], skip_special_tokens: bool) -> Iterator[str]:
        run: list[int] = []
        special = set(self._special.values())
        for index in map(int, ids):
            if index in self._names and index not in special:
                run.append(index)
                continue
            if skip_special_tokens or index not in self._names:
                continue
            yield self._model.decode(run)
            run = []
            yield self._names[index]
        yield self._model.decode(run)

    def get_vocab(self) -> dict[str, int]:
        """Token to id."""
        return {name: index for index, name in self._names.items()}

    def convert_ids_to_tokens(self, index: int) -> str | None:
        """The token of an id; None if there is none."""
        return self._names.get(index)

    def get_chat_template(self) -> str:
        """The template's text.

        Raises:
            ValueError: there is none.
        """
        if self._template is None:
            raise ValueError("there is no chat template beside tokenizer.model; put chat_template.jinja there")
        return self._template

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> str:
        """A conversation as text, special tokens spelled out."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if tokenize:
            raise NotImplementedError("render to text, and call the tokenizer with add_special_tokens=False")
        special = {
            f"{name}_token": self._names[index]
            for name, index in (("bos", self.bos_token_id), ("eos", self.eos_token_id), ("unk", self.unk_id))
            if index is not None
        }
        rendered = render_jinja_template(
            [messages],
            chat_template=self.get_chat_template(),
            add_generation_prompt=add_generation_prompt,
            **(special | kwargs),
        )
        texts = rendered[0] if isinstance(rendered, tuple) else rendered
        return texts[0]


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content
