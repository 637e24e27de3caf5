"""A bank: student-visited contexts, frozen, with what both models said at every position of them.

A directory of three files: ``contexts.jsonl`` (rollouts), ``positions.parquet`` (a row a position) and ``bank.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from megatron_taopd import __version__
from megatron_taopd.data.records import Rollout, read_rollouts, write_rollouts
from megatron_taopd.diagnostics.hashes import hash_object
from megatron_taopd.errors import ConfigError, DataError
from megatron_taopd.files import sha256_of_file
from megatron_taopd.teachability import SupportMode, TokenStatistics

FORMAT, FORMAT_VERSION = "taopd-bank", 1
CONTEXTS, POSITIONS, RECORD = "contexts.jsonl", "positions.parquet", "bank.json"

SHARED_COLUMNS = ("H", "kl_forward", "kl_reverse", "student_logprob", "teacher_logprob", "teacher_entropy")
"""Statistics that know no K."""
SUPPORT_COLUMNS = (
    "D",
    "C",
    "C_topk",
    "H_topk",
    "overlap",
    "student_mass",
    "teacher_mass",
    "teacher_top1_in_student",
    "rank_in_student",
    "rank_in_teacher",
)
"""Statistics that are kept for each K, as NAME_kK; beside them D_upstream_kK, the D of upstream mode."""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """A model that a bank or a gain was made with."""

    path: str
    fingerprint: str
    name: str | None = None
    """Of one of several teachers."""


@dataclass(frozen=True, kw_only=True)
class BankRecord:
    """What made a bank; ``bank.json``."""

    student: ModelRecord
    teachers: list[ModelRecord]
    tokenizer: str | None
    """Fingerprint; None: neither model has one."""
    vocab_size: int
    """Ids common to both models, over which all is taken."""
    temperature: float
    support_k: list[int]
    precision: dict[str, Any]
    """Fields of ``PrecisionConfig``."""
    teacher_dtype: Literal["bf16", "fp32"] | None
    allow_stop_token_mismatch: bool
    micro_batch_size: int
    logits_chunk_bytes: int
    rollout_data: str
    rollout_sha256: str
    num_prompts: int
    num_responses: int
    num_positions: int
    positions_per_response: int
    """Most positions of a response that are in the bank."""
    files: dict[str, str]
    """SHA-256 of the other files."""

    @property
    def id(self) -> str:
        """Tells banks apart: a hash of all of the above."""
        return hash_object(asdict(self))[:16]


@dataclass(frozen=True, kw_only=True)
class Bank:
    """An opened bank of N positions, ordered by response and position."""

    directory: Path
    record: BankRecord
    positions: dict[str, np.ndarray]
    """Columns [N]."""

    def contexts(self) -> list[Rollout]:
        """The responses, cut to what is banked."""
        return read_rollouts(self.directory / CONTEXTS, vocab_size=self.record.vocab_size)

    def first_row(self) -> np.ndarray:
        """Row of each response's first position [responses]."""
        return np.flatnonzero(self.positions["position"] == 0)

    def statistics(self, k: int, mode: SupportMode) -> TokenStatistics:
        """What ``taopd score --support-k K --support-mode MODE`` would give at the positions, on the CPU.

        Raises:
            ConfigError: the bank has no such K.
        """
        if k not in self.record.support_k:
            known = ", ".join(map(str, self.record.support_k))
            raise ConfigError(f"bank {self.directory} was not made for --support-k {k}; it has {known}")
        columns = {name: self.positions[name] for name in SHARED_COLUMNS}
        columns |= {name: self.positions[f"{name}_k{k}"] for name in SUPPORT_COLUMNS}
        if mode == "upstream":
            columns |= {"D": self.positions[f"D_upstream_k{k}"], "C": columns["C_topk"]}
        return TokenStatistics(**{name: torch.from_numpy(values) for name, values in columns.items()})

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Index of the response and position in it of each row, int64 [N]."""
        sample_index, position = (
            torch.from_numpy(self.positions[name].astype(np.int64)) for name in ("sample_index", "position")
        )
        return sample_index, position


def choose_contexts(
    rollouts: Sequence[Rollout], *, num_prompts: int, responses_per_prompt: int, positions_per_response: int
) -> tuple[list[Rollout], list[int]]:
    """The first responses to the first prompts, cut, in file order.

    Returns:
        The responses, and of each the index of its prompt.
    """
    prompts: dict[tuple[int, ...], int] = {}
    taken: list[int] = []
    chosen: list[Rollout] = []
    indices: list[int] = []
    for rollout in rollouts:
        key = tuple(rollout.prompt_tokens)
        if key not in prompts:
            if len(prompts) == num_prompts:
                continue
            prompts[key] = len(prompts)
            taken.append(0)
        index = prompts[key]
        if taken[index] < responses_per_prompt:
            taken[index] += 1
            chosen.append(_cut(rollout, positions_per_response))
            indices.append(index)
    return chosen, indices


def _cut(rollout: Rollout, length: int) -> Rollout:
    if len(rollout.response_tokens) <= length:
        return rollout
    logprobs = rollout.response_logprobs
    return replace(
        rollout,
        response_tokens=rollout.response_tokens[:length],
        response_logprobs=None if logprobs is None else logprobs[:length],
        finish_reason="length",
        response=None,  # the text of all of it would not be that of these tokens
    )


def refuse_existing(directory: str | Path) -> None:
    """Raises:
    ConfigError: a bank would be written over something.
    """
    directory = Path(directory)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ConfigError(
            f"--output {directory} exists and a bank is written once; give another directory, or remove this one"
        )


def write_bank(
    directory: str | Path, contexts: Sequence[Rollout], positions: dict[str, np.ndarray], **made_with: Any
) -> BankRecord:
    """Write a bank, aside first and then by rename; ``made_with`` are the other fields of its record."""
    directory = Path(directory)
    partial = directory.with_name(f".{directory.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    write_rollouts(partial / CONTEXTS, contexts)
    pyarrow.parquet.write_table(pa.table(positions), partial / POSITIONS)
    files = {name: sha256_of_file(partial / name) for name in (CONTEXTS, POSITIONS)}
    record = BankRecord(files=files, num_responses=len(contexts), num_positions=len(positions["position"]), **made_with)
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "taopd_version": __version__, "id": record.id}
    text = json.dumps(head | asdict(record), indent=2, ensure_ascii=False)
    (partial / RECORD).write_text(text + "\n", encoding="utf-8")
    if directory.is_dir():
        directory.rmdir()  # empty, as refuse_existing has seen
    os.replace(partial, directory)
    return record


def open_bank(directory: str | Path) -> Bank:
    """Read a bank and check that it is what it was.

    Raises:
        DataError: it is no bank, of another version, or its files were changed.
    """
    directory = Path(directory)
    try:
        content = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"--bank {directory} is no bank: {RECORD} cannot be read ({error.strerror}); make one with "
            "`taopd diagnose bank`"
        ) from error
    except ValueError as error:
        raise DataError(f"{directory / RECORD} is not JSON: {error}; make the bank again") from error
    version = (content.pop("format", None), content.pop("format_version", None))
    if version != (FORMAT, FORMAT_VERSION):
        raise DataError(
            f"{directory / RECORD} is of format {version[0]} {version[1]} and this is for {FORMAT} {FORMAT_VERSION}; "
            "make the bank again with this version"
        )
    content.pop("taopd_version")
    recorded = content.pop("id")
    record = BankRecord(
        student=ModelRecord(**content.pop("student")),
        teachers=[ModelRecord(**teacher) for teacher in content.pop("teachers")],
        **content,
    )
    if record.id != recorded:
        raise DataError(f"{directory / RECORD} was changed after the bank was made; make the bank again")
    for name, wanted in record.files.items():
        if not (directory / name).is_file():
            raise DataError(f"bank {directory} is incomplete: no {name}; make the bank again")
        if sha256_of_file(directory / name) != wanted:
            raise DataError(
                f"{directory / name} was changed after the bank was made, so its positions are no longer those of "
                f"{RECORD}; make the bank again"
            )
    table = pyarrow.parquet.read_table(directory / POSITIONS)
    positions = {name: table[name].to_numpy().copy() for name in table.column_names}  # copied: torch wants to own it
    return Bank(directory=directory, record=record, positions=positions)
