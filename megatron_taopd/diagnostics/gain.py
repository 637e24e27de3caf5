"""Gain files: a checkpoint's gain on the positions of a bank, with what it belongs to in the parquet metadata."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from megatron_taopd.diagnostics.bank import Bank, ModelRecord
from megatron_taopd.errors import DataError

FORMAT, FORMAT_VERSION = "taopd-gain", 1
_METADATA = b"taopd"


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A checkpoint's gain on the N positions of a bank, in the order of the bank."""

    file: str
    name: str
    bank_id: str
    checkpoint: ModelRecord
    columns: dict[str, np.ndarray]
    """[N]: the bank's places; ``kl_forward_before``, ``kl_forward_after``, the same of ``kl_reverse``; ``gain`` =
    kl_forward_before − kl_forward_after (nats)."""


def write_gain(gain: Gain) -> None:
    """Write a gain file, aside first and then by rename."""
    path = Path(gain.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bank": gain.bank_id,
        "checkpoint": asdict(gain.checkpoint),
    }
    table = pa.table(gain.columns).replace_schema_metadata({_METADATA: json.dumps(head)})
    partial = path.with_name(path.name + ".partial")
    pyarrow.parquet.write_table(table, partial)
    os.replace(partial, path)


def read_gain(path: str, bank: Bank, *, name: str | None = None) -> Gain:
    """Read a gain file of this bank.

    Args:
        name: what the checkpoint is called (default: the file's name).

    Raises:
        DataError: it is no gain file, or of another bank.
    """
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"--gain {path} cannot be read: {error}; make it with `taopd diagnose gain`") from error
    head = json.loads((table.schema.metadata or {}).get(_METADATA, b"{}"))
    if (head.get("format"), head.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise DataError(f"--gain {path} is not a file of `taopd diagnose gain` of this version; make it again")
    if head["bank"] != bank.record.id:
        raise DataError(
            f"--gain {path} was taken on bank {head['bank']} and --bank {bank.directory} is {bank.record.id}: their "
            "positions differ; take the gain on this bank"
        )
    return Gain(
        file=path,
        name=name or Path(path).stem,
        bank_id=head["bank"],
        checkpoint=ModelRecord(**head["checkpoint"]),
        columns={column: table[column].to_numpy() for column in table.column_names},
    )
