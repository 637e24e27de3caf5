"""Safetensors files, read and written piece by piece.

Files are read with positioned reads, not mapped: pages of a mapped file stay in the process's memory as long as the
machine has room, so that converting a large file would look, and be counted, as if the model were held.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_taopd.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; ``stored[a:b]`` and ``stored[:, a:b]`` read it, the former those rows only."""

    file: Path
    name: str
    type_name: str
    """As the file spells it: F32, BF16, I8, …"""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the values; types that are no floating-point numbers are not known here."""
        return DTYPES[self.type_name]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> torch.Tensor:
        rows, *rest = (index,) if isinstance(index, slice) else index
        first, last, step = rows.indices(self.shape[0])
        assert step == 1, index
        row_bytes = self.dtype.itemsize
        for size in self.shape[1:]:
            row_bytes *= size
        count = max(last - first, 0)
        flat = _read(self.file, self.start + first * row_bytes, count * row_bytes)
        value = flat.view(self.dtype).reshape(count, *self.shape[1:])
        return value[(slice(None), *rest)] if rest else value


def _read(file: Path, start: int, size: int) -> torch.Tensor:
    buffer = torch.empty(size, dtype=torch.uint8)
    view = buffer.numpy().data
    with open(file, "rb", buffering=0) as stream:
        stream.seek(start)
        done = 0
        while done < size:  # one read gives 2 GiB at most
            got = stream.readinto(view[done:])
            if not got:
                raise ModelError(f"{file} ends {size - done} bytes too early; download it again")
            done += got
    return buffer


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises:
        ModelError: the file is no safetensors file, or it is shorter than its header says.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors, end = {}, 8 + length
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            tensors[name] = StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + first)
            end = max(end, 8 + length + last)
            _check_size(tensors[name], last - first)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} cannot be read, it may be truncated: {error}") from error
    if end > size:
        raise ModelError(f"{file} cannot be read, it may be truncated: it has {size} bytes of {end}")
    return tensors


def _check_size(stored: StoredTensor, size: int) -> None:
    if stored.type_name not in DTYPES:
        return
    wanted = stored.dtype.itemsize
    for count in stored.shape:
        wanted *= count
    if size != wanted:
        raise ValueError(f"{stored.name} of shape {list(stored.shape)} takes {size} bytes instead of {wanted}")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        size = self.dtype.itemsize
        for count in self.shape:
            size *= count
        return size


def write_header(stream: BinaryIO, entries: Sequence[Entry]) -> None:
    """Begin a file of these tensors, whose values follow in this order by :func:`write_values`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [place, place + entry.num_bytes],
        }
        place += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little"))
    stream.write(text)


def write_values(stream: BinaryIO, tensor: torch.Tensor) -> None:
    """Append a tensor, or the next rows of one."""
    stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def deal(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Entries in order, cut into files of at most ``max_bytes`` of values (or of one larger tensor)."""
    files: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if files[-1] and held + entry.num_bytes > max_bytes:
            files.append([])
            held = 0
        files[-1].append(entry)
        held += entry.num_bytes
    return files
