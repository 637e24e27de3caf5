"""Megatron's ``torch_dist`` format, written and read one tensor at a time, without process groups.

A checkpoint directory has data files, in which every chunk of a tensor is a ``torch.save`` archive at some offset, an
index ``.metadata`` (torch's ``Metadata``), the objects that are not sharded in ``common.pt``, and ``metadata.json``.
"""

from __future__ import annotations

import json
import pickle
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_taopd.checkpoint.integrity import read_index
from megatron_taopd.errors import CheckpointError

_KIND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Chunk:
    """A chunk that was written: its place in the whole tensor, and in which bytes of which file it is."""

    key: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


def write_chunk(stream: BinaryIO, value: torch.Tensor) -> tuple[int, int]:
    """Append a chunk; returns its first byte and its length."""
    start = stream.tell()
    value = value.contiguous()
    if value.untyped_storage().nbytes() != value.numel() * value.element_size():
        value = value.clone()  # a view would be saved with all that it is a view of
    torch.save(value, stream)
    return start, stream.tell() - start


@dataclass
class IndexWriter:
    """Collects the chunks of a checkpoint and writes what else belongs to it."""

    _tensors: dict[str, TensorStorageMetadata] = field(default_factory=dict)
    _places: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)

    def add(self, chunk: Chunk) -> None:
        """Note a chunk.

        Raises:
            CheckpointError: another chunk under its key has another type.
        """
        tensor = self._tensors.get(chunk.key)
        if tensor is None:
            properties = TensorProperties(dtype=chunk.dtype)
            tensor = TensorStorageMetadata(properties, torch.Size(chunk.global_shape), [])
            self._tensors[chunk.key] = tensor
        if tensor.properties.dtype != chunk.dtype:
            raise CheckpointError(
                f"the layers of {chunk.key} have different types ({tensor.properties.dtype} and {chunk.dtype}), which "
                "Megatron stores under one name; give one --dtype"
            )
        offsets = torch.Size(chunk.offsets)
        tensor.chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
        self._places[MetadataIndex(chunk.key, offsets)] = _StorageInfo(chunk.file, chunk.start, chunk.length)

    def write(self, directory: Path, common: dict[str, Any]) -> None:
        """Write index and common objects."""
        index = Metadata(state_dict_metadata=dict(self._tensors), storage_data=self._places)
        with open(directory / ".metadata", "wb") as stream:
            pickle.dump(index, stream)
        torch.save(common, directory / "common.pt")
        (directory / "metadata.json").write_text(json.dumps(_KIND))


class CheckpointReader:
    """Regions of the tensors of one checkpoint.

    Raises:
        CheckpointError: a file is missing or too short, or the index is not one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = read_index(path)
        self._reader = FileSystemReader(path)
        self._reader.set_up_storage_reader(self._index, is_coordinator=True)
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: entry
            for name, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._places: dict[str, _Places] = {}

    def common(self) -> dict[str, Any]:
        """The objects that are not sharded."""
        from megatron.core import dist_checkpointing

        return dist_checkpointing.load_common_state_dict(str(self.path))

    def row_blocks(self, key: str) -> list[tuple[int, int]]:
        """First and last-plus-one of the runs of rows in which a matrix is stored."""
        starts = {chunk.offsets[0] for chunk in self.tensors[key].chunks}
        bounds = [*sorted(starts), self.tensors[key].size[0]]
        return list(zip(bounds, bounds[1:], strict=False))

    def read(self, key: str, offsets: Iterable[int], sizes: Iterable[int]) -> torch.Tensor:
        """A region of a tensor, put together from the chunks that it is stored in.

        Raises:
            CheckpointError: the chunks do not cover it, or their bytes cannot be read.
        """
        region = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        if key not in self._places:
            self._places[key] = _Places(self.tensors[key].chunks)
        nearby = replace(self.tensors[key], chunks=self._places[key].near(region))
        items = create_read_items_for_chunk_list(key, nearby, [region])
        covered = sum(torch.Size(item.lengths).numel() for item in items)
        if covered != region.sizes.numel():
            raise CheckpointError(f"checkpoint {self.path} has {covered} of {region.sizes.numel()} values of {key}")
        target = _Target(region, self.tensors[key].properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), target).wait()
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, AssertionError, ValueError) as error:
            files = sorted({self._index.storage_data[item.storage_index].relative_path for item in items})
            raise CheckpointError(
                f"checkpoint {self.path}: {key} cannot be read from {', '.join(files)}: {error}"
            ) from error
        return target.value


class _Places:
    """The chunks of a tensor by their place along its first dimensions, as far as every chunk has size 1 there.

    Layers and experts are such dimensions. Without it each expert would be looked for among those of all layers.
    """

    def __init__(self, chunks: list[ChunkStorageMetadata]) -> None:
        self._all = chunks
        per_dimension = zip(*(chunk.sizes for chunk in chunks), strict=True)
        self._depth = sum(1 for _ in takewhile(lambda sizes: set(sizes) == {1}, per_dimension))
        self._found: dict[tuple[int, ...], list[ChunkStorageMetadata]] = defaultdict(list)
        for chunk in chunks:
            self._found[tuple(chunk.offsets[: self._depth])].append(chunk)

    def near(self, region: ChunkStorageMetadata) -> list[ChunkStorageMetadata]:
        """The chunks that may overlap with a region."""
        if any(size != 1 for size in region.sizes[: self._depth]):
            return self._all
        return self._found.get(tuple(region.offsets[: self._depth]), [])


class _Target(LoadPlanner):
    """Where the reader puts what it reads."""

    def __init__(self, region: ChunkStorageMetadata, dtype: torch.dtype) -> None:
        self.value = torch.empty(region.sizes, dtype=dtype)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of the region that this chunk fills."""
        part = self.value
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: the reader has copied into the region."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Not called: there is no plan to be made."""
        raise NotImplementedError

    create_local_plan = create_global_plan = finish_plan = load_bytes = cast(Any, set_up_planner)
