"""Megatron checkpoint -> HF directory, tensor by tensor, in one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_taopd.checkpoint.layout import find_iteration, is_megatron_checkpoint
from megatron_taopd.convert.full_tensors import FullTensor, Part, full_tensors
from megatron_taopd.convert.hf_writer import weight_file_name, write_companions, write_weight_index
from megatron_taopd.convert.progress import Progress
from megatron_taopd.convert.safetensors_files import Entry, deal, write_header, write_values
from megatron_taopd.convert.torch_dist import CheckpointReader
from megatron_taopd.convert.workspace import Workspace
from megatron_taopd.errors import CheckpointError, ModelError
from megatron_taopd.models.hf_config import HFModelConfig, load_hf_config

_EMBEDDING = "embedding.word_embeddings.weight"
_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.", "mtp.")


@dataclass(frozen=True)
class StoredModel:
    """Megatron's tensors of a checkpoint, matched with the model that its configuration describes."""

    reader: CheckpointReader
    hf: HFModelConfig
    tensors: tuple[tuple[FullTensor, Part], ...]

    def dtype(self, part: Part) -> torch.dtype:
        """Of a tensor as it is stored."""
        return self.reader.tensors[part.key].properties.dtype

    def read(self, tensor: FullTensor, part: Part) -> torch.Tensor:
        """A tensor, whole."""
        offsets = (*part.place, *(0 for _ in tensor.shape))
        sizes = (*(1 for _ in part.place), *tensor.shape)
        return self.reader.read(part.key, offsets, sizes).reshape(tensor.shape)

    def hf_values(self, tensor: FullTensor, part: Part) -> Iterator[tuple[str, torch.Tensor]]:
        """The HF tensors that this one holds; of a vocabulary's matrix runs of rows, one after the other."""
        if not tensor.is_vocabulary:
            yield from zip(tensor.hf_names, tensor.split(self.read(tensor, part)), strict=True)
            return
        rows = tensor.hf_shapes[0][0]
        for first, last in self.reader.row_blocks(part.key):
            if first < rows:
                block = self.reader.read(part.key, (first, 0), (last - first, tensor.shape[1]))
                yield tensor.hf_names[0], block[: rows - first]


def open_stored_model(source: str | Path, hf_source: str | Path | None = None) -> StoredModel:
    """Match a checkpoint with its configuration; every tensor has its place or is refused.

    Args:
        source: root of a Megatron checkpoint, or one of its iterations.
        hf_source: where config.json is; default: the ``hf/`` of the checkpoint.

    Raises:
        CheckpointError: no or an incomplete checkpoint, or tensors are missing, superfluous or misshapen.
        ModelError: the configuration is of no use.
    """
    path, _ = find_iteration(source)
    hf = load_hf_config(path if hf_source is None else hf_source)
    reader = CheckpointReader(path)
    stored = reader.tensors
    padded = stored[_EMBEDDING].size[0] if _EMBEDDING in stored else hf.vocab_size
    if padded < hf.vocab_size:
        raise CheckpointError(
            f"{path}: {_EMBEDDING} has {padded} rows, but {hf.path} has a vocabulary of {hf.vocab_size}"
        )
    matched = []
    for tensor in full_tensors(hf, padded):
        candidates = (tensor.part, *tensor.others)
        part = next((part for part in candidates if part.key in stored), None)
        if part is None:
            raise CheckpointError(
                f"{path} has no tensor {tensor.part.key}, which {', '.join(tensor.hf_names)} of {hf.path} come from"
            )
        shape, wanted = tuple(stored[part.key].size), part.counts + tensor.shape
        if shape != wanted:
            raise CheckpointError(
                f"{path}: {part.key} has shape {list(shape)}, but the configuration in {hf.path} implies {list(wanted)}"
            )
        matched.append((tensor, part))
    known = {part.key for _, part in matched}
    for name in sorted(stored.keys() - known):
        tied_head = hf.tied and name == "output_layer.weight"  # some write it; Megatron holds it equal
        if name.startswith(_OF_THE_MODEL) and not tied_head:
            raise CheckpointError(f"{path}: the architecture in {hf.path} has no place for {name}")
    return StoredModel(reader, hf, tuple(matched))


def convert_to_hf(
    source: str | Path,
    out_dir: str | Path,
    *,
    hf_source: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write an HF directory that ``from_pretrained`` loads, from a checkpoint of any layout.

    Interrupted work is taken up again by the same call. What cannot be converted is refused before anything is written.

    Args:
        source: root of a Megatron checkpoint, whose newest iteration is taken, or one of its iterations.
        hf_source: HF directory with configuration and tokenizer; default: the ``hf/`` of the checkpoint.
        dtype: of the weights; default: that of each tensor in the checkpoint.
        max_shard_bytes: size at which the next weight file is begun; what is done again after an interruption.
        overwrite: replace an HF directory that is there already.

    Returns:
        ``out_dir``.

    Raises:
        CheckpointError: the checkpoint is incomplete, does not fit its configuration or cannot be read; or
            writing failed.
        ModelError: the architecture is unknown, or ``source`` is no checkpoint.
        ConfigError: ``out_dir`` is there already, or another process is at work on it.
    """
    if not is_megatron_checkpoint(source):
        raise ModelError(f"{source} is no Megatron checkpoint: it has no latest_checkpointed_iteration.txt")
    model = open_stored_model(source, hf_source)
    entries = [
        Entry(name, shape, dtype or model.dtype(part))
        for tensor, part in model.tensors
        for name, shape in zip(tensor.hf_names, tensor.hf_shapes, strict=True)
    ]
    for entry in entries:
        if not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
            raise CheckpointError(f"{model.reader.path}: {entry.name} is stored as {entry.dtype}; give a --dtype")
    job = {
        "direction": "megatron-to-hf",
        "source": _identity(model.reader.path),
        "config": model.hf.raw,
        "companions": str(model.hf.path.absolute()),
        "dtype": str(dtype),
        "max_shard_bytes": max_shard_bytes,
    }
    try:
        workspace = Workspace(out_dir, job=job, overwrite=overwrite, replaceable=_reason_to_keep)
        if not workspace.already_published:
            _write(workspace, model, deal(entries, max_shard_bytes))
        workspace.publish()
    except OSError as error:
        raise CheckpointError(f"cannot write {out_dir}: {error}") from error
    return Path(out_dir)


def _write(workspace: Workspace, model: StoredModel, files: list[list[Entry]]) -> None:
    progress = Progress("converted", sum(entry.num_bytes for file in files for entry in file))
    sources = {name: match for match in model.tensors for name in match[0].hf_names}
    weight_map: dict[str, str] = {}
    types: Counter[torch.dtype] = Counter()
    for number, entries in enumerate(files):
        file = weight_file_name(number, len(files))
        if workspace.finished(file) is not None:
            progress.add(sum(entry.num_bytes for entry in entries), skipped=True)
        else:
            with workspace.write(file, notes=[]) as stream:
                write_header(stream, entries)
                _write_entries(stream, entries, model, sources, progress)
        for entry in entries:
            weight_map[entry.name] = file
            types[entry.dtype] += entry.num_bytes
    if len(files) > 1:
        write_weight_index(workspace.content, weight_map, types.total())
    write_companions(workspace.content, model.hf, model.hf.path, str(types.most_common(1)[0][0]).removeprefix("torch."))
    progress.finish()


def _write_entries(
    stream: BinaryIO,
    entries: Iterable[Entry],
    model: StoredModel,
    sources: dict[str, tuple[FullTensor, Part]],
    progress: Progress,
) -> None:
    """Values of a file, in order. Entries that come from one tensor follow each other, so that it is read once."""
    wanted = {entry.name: entry for entry in entries}
    while wanted:
        for name, value in model.hf_values(*sources[next(iter(wanted))]):
            if name in wanted:
                write_values(stream, value.to(wanted[name].dtype))
                progress.add(value.numel() * wanted[name].dtype.itemsize)
        for name in sources[next(iter(wanted))][0].hf_names:
            wanted.pop(name, None)


def _identity(path: Path) -> dict[str, object]:
    files = {}
    for file in sorted([*path.glob("*.distcp"), path / ".metadata"]):
        status = file.stat()
        files[file.name] = [status.st_size, status.st_mtime_ns]
    return {"path": str(path.absolute()), "files": files}


def _reason_to_keep(directory: Path) -> str | None:
    return None if (directory / "config.json").is_file() else "it is no HF model directory"
