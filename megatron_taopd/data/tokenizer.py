"""Tokenizers of model directories, and whether two of them mean the same by an id."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron_taopd.data.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_taopd.errors import ModelError, TokenizerMismatchError

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_NUM_SHOWN = 5


def load_tokenizer(source: str | Path) -> Any | None:
    """The tokenizer of an HF directory or of a Megatron checkpoint; None where there are no tokenizer files.

    One of transformers, or a :class:`SentencePieceTokenizer` where ``tokenizer.model`` is there and no
    ``tokenizer.json``. Code that comes with a tokenizer is never run.

    Raises:
        ModelError: there is no such directory, or the files do not make a tokenizer.
    """
    directory = _hf_directory(source)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    if (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file():
        return SentencePieceTokenizer(directory)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the many tokenizer classes raise
        raise ModelError(f"the tokenizer in {directory} cannot be loaded: {error}") from error


def check_tokenizers_agree(
    student: str | Path, teacher: str | Path, *, allow_stop_token_mismatch: bool = False
) -> None:
    """Refuse a pair of models that do not read, or do not stop on, the same token ids.

    Ids that only one tokenizer knows are noted and allowed. Where one directory has no tokenizer the other's
    is trusted, where neither has one there is nothing to compare.

    Raises:
        TokenizerMismatchError: an id stands for different tokens, or the stop tokens differ.
    """
    tokenizers = {name: load_tokenizer(source) for name, source in (("student", student), ("teacher", teacher))}
    student_tokenizer, teacher_tokenizer = tokenizers.values()
    if student_tokenizer is not None and teacher_tokenizer is not None:
        _compare_vocabularies(student_tokenizer, teacher_tokenizer)
    elif student_tokenizer is not teacher_tokenizer:
        missing = next(name for name, tokenizer in tokenizers.items() if tokenizer is None)
        logger.info("the %s's directory has no tokenizer; the other model's is used, unchecked", missing)
    tokenizer = student_tokenizer or teacher_tokenizer
    _compare_stop_tokens(student, teacher, tokenizer, allow_stop_token_mismatch)


def _compare_vocabularies(student: Any, teacher: Any) -> None:
    student_tokens, teacher_tokens = _tokens_by_id(student), _tokens_by_id(teacher)
    common = student_tokens.keys() & teacher_tokens.keys()
    different = sorted(i for i in common if student_tokens[i] != teacher_tokens[i])
    if different:
        shown = "; ".join(
            f"id {i}: {student_tokens[i]!r} for the student, {teacher_tokens[i]!r} for the teacher"
            for i in different[:_NUM_SHOWN]
        )
        more = f"; and {len(different) - _NUM_SHOWN} more" if len(different) > _NUM_SHOWN else ""
        raise TokenizerMismatchError(
            f"student and teacher have different tokenizers: {len(different)} of {len(common)} common token "
            "ids "
            f"stand for different tokens ({shown}{more}). The teacher scores the student's token ids, so "
            "both need one tokenizer; choose models of one family"
        )
    for name, ours, others in (("student", student_tokens, common), ("teacher", teacher_tokens, common)):
        alone = sorted(ours.keys() - others)
        if alone:
            examples = ", ".join(f"{i} {ours[i]!r}" for i in alone[:_NUM_SHOWN])
            logger.info("only the %s's tokenizer knows %d token ids (%s ...)", name, len(alone), examples)


def _tokens_by_id(tokenizer: Any) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _compare_stop_tokens(student: str | Path, teacher: str | Path, tokenizer: Any | None, allow_mismatch: bool) -> None:
    student_stops, teacher_stops = _stop_tokens(student), _stop_tokens(teacher)
    if set(student_stops) == set(teacher_stops):
        return
    message = (
        f"the student stops on {_describe(student_stops, tokenizer)}, the teacher on "
        f"{_describe(teacher_stops, tokenizer)} (eos_token_id of generation_config.json, else of config.json)"
    )
    if not allow_mismatch:
        raise TokenizerMismatchError(
            f"{message}. The teacher would teach the student not to stop, or to stop on a token it does not "
            "use; make them equal, or train all the same with --allow-stop-token-mismatch"
        )
    logger.warning("%s; allowed by --allow-stop-token-mismatch", message)


def _describe(stops: tuple[int, ...], tokenizer: Any | None) -> str:
    if not stops:
        return "no token at all"
    if tokenizer is None:
        return " and ".join(str(i) for i in stops)
    return " and ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in stops)


# Where the files of a model lie is known by the models room, which is above this one.
def _hf_directory(source: str | Path) -> Path:
    from megatron_taopd.models.source import hf_directory

    return hf_directory(source)


def _stop_tokens(source: str | Path) -> tuple[int, ...]:
    from megatron_taopd.models.hf_config import load_hf_config

    return load_hf_config(source).eos_token_ids
