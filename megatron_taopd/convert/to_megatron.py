"""HF directory -> Megatron checkpoint, tensor by tensor, in one process."""

from __future__ import annotations

import logging
import shutil
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_taopd.checkpoint import layout
from megatron_taopd.checkpoint.optimizer_state import METADATA
from megatron_taopd.convert.arguments import megatron_arguments
from megatron_taopd.convert.full_tensors import FullTensor, full_tensors
from megatron_taopd.convert.health import WeightReport
from megatron_taopd.convert.hf_reader import HFReader
from megatron_taopd.convert.progress import Progress
from megatron_taopd.convert.torch_dist import Chunk, IndexWriter, write_chunk
from megatron_taopd.convert.workspace import Workspace
from megatron_taopd.errors import CheckpointError, ModelError
from megatron_taopd.models.build import pad_vocab_size
from megatron_taopd.models.hf_config import HFModelConfig, load_hf_config

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class _Piece:
    """A tensor, or one block of its rows, that becomes a chunk."""

    tensor: FullTensor
    dtype: torch.dtype
    block: int
    blocks: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.tensor.shape[0] // self.blocks, *self.tensor.shape[1:])

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.sizes).numel() * self.dtype.itemsize

    def chunk(self, file: str, start: int, length: int) -> Chunk:
        part, sizes = self.tensor.part, self.sizes
        return Chunk(
            key=part.key,
            global_shape=part.counts + self.tensor.shape,
            dtype=self.dtype,
            offsets=(*part.place, self.block * sizes[0], *(0 for _ in sizes[1:])),
            sizes=(*(1 for _ in part.place), *sizes),
            file=file,
            start=start,
            length=length,
        )


def convert_to_megatron(
    source: str | Path,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    make_vocab_size_divisible_by: int = 128,
    max_shard_bytes: int = 2_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write ``out_dir/release`` in Megatron's distributed format, which loads at any layout.

    Interrupted work is taken up again by the same call. What cannot be converted is refused before anything is
    written, except for values that are not finite or all zero, which are found on the way.

    Args:
        source: HF directory.
        dtype: of the weights; default: that of each tensor in the source.
        make_vocab_size_divisible_by: the vocabulary is padded with rows of zeros to a multiple of it.
        max_shard_bytes: size at which the next data file is begun; what is done again after an interruption.
        overwrite: replace ``out_dir`` if it was converted earlier.

    Returns:
        ``out_dir``.

    Raises:
        ModelError: a tensor or a file is missing, unreadable, superfluous or misshapen, or the architecture unknown.
        ConfigError: ``out_dir`` is there already, or another process is at work on it.
        CheckpointError: writing failed.
    """
    if layout.is_megatron_checkpoint(source):
        raise ModelError(
            f"{source} is a Megatron checkpoint already; `taopd convert megatron-to-hf` makes it an HF one"
        )
    hf = load_hf_config(source)
    reader = HFReader(hf.path)
    padded = pad_vocab_size(hf.vocab_size, tp=1, multiple=make_vocab_size_divisible_by)
    tensors = list(full_tensors(hf, padded))
    reader.refuse_others({name for tensor in tensors for name in tensor.hf_names}, tied=hf.tied)
    arguments = megatron_arguments(hf, padded, make_vocab_size_divisible_by=make_vocab_size_divisible_by)
    files = _deal([piece for tensor in tensors for piece in _pieces(tensor, reader, dtype)], max_shard_bytes)
    job = {
        "direction": "hf-to-megatron",
        "source": reader.identity(),
        "config": hf.raw,
        "dtype": str(dtype),
        "padded_vocab_size": padded,
        "make_vocab_size_divisible_by": make_vocab_size_divisible_by,
        "max_shard_bytes": max_shard_bytes,
        "torch": torch.__version__,
    }
    try:
        workspace = Workspace(out_dir, job=job, overwrite=overwrite, replaceable=_reason_to_keep)
        if not workspace.already_published:
            _write(workspace, reader, hf, files, arguments)
        workspace.publish()
    except OSError as error:
        raise CheckpointError(f"cannot write {out_dir}: {error}") from error
    return Path(out_dir)


def _pieces(tensor: FullTensor, reader: HFReader, dtype: torch.dtype | None) -> Iterator[_Piece]:
    stored = {
        name: reader.slice(name, shape).dtype for name, shape in zip(tensor.hf_names, tensor.hf_shapes, strict=True)
    }
    if dtype is None:
        if len(set(stored.values())) > 1:
            listed = ", ".join(f"{name} {kind}" for name, kind in stored.items())
            raise ModelError(
                f"{reader.path}: tensors that Megatron joins have different types ({listed}); give --dtype"
            )
        dtype = next(iter(stored.values()))
    blocks = tensor.blocks(_BLOCK_BYTES, dtype.itemsize)
    for block in range(blocks):
        yield _Piece(tensor, dtype, block, blocks)


def _deal(pieces: list[_Piece], max_bytes: int) -> list[list[_Piece]]:
    files: list[list[_Piece]] = [[]]
    held = 0
    for piece in pieces:
        if files[-1] and held + piece.num_bytes > max_bytes:
            files.append([])
            held = 0
        files[-1].append(piece)
        held += piece.num_bytes
    return files


def _write(
    workspace: Workspace, reader: HFReader, hf: HFModelConfig, files: list[list[_Piece]], arguments: Namespace
) -> None:
    index = IndexWriter()
    progress = Progress("converted", sum(piece.num_bytes for file in files for piece in file))
    for number, pieces in enumerate(files):
        name = f"__0_{number}.distcp"
        places: list[list[int]] | None = workspace.finished(f"{layout.RELEASE}/{name}")
        if places is not None:
            progress.add(sum(piece.num_bytes for piece in pieces), skipped=True)
        else:
            places = []
            with workspace.write(f"{layout.RELEASE}/{name}", notes=places) as stream:
                for piece in pieces:
                    places.append(list(write_chunk(stream, _value(piece, reader))))
                    progress.add(piece.num_bytes)
        for piece, (start, length) in zip(pieces, places, strict=True):
            index.add(piece.chunk(name, start, length))
    release = workspace.content / layout.RELEASE
    index.write(release, _common(hf, arguments))
    shutil.rmtree(release / layout.HF_FILES, ignore_errors=True)
    layout.copy_hf_files(hf.path, release / layout.HF_FILES)
    layout.write_latest_release(workspace.content)
    progress.finish()


def _value(piece: _Piece, reader: HFReader) -> torch.Tensor:
    tensor = piece.tensor
    report = WeightReport()
    sources = tuple(
        report.watch(name, reader.slice(name, shape))
        for name, shape in zip(tensor.hf_names, tensor.hf_shapes, strict=True)
    )
    value = tensor.build(sources, piece.block, piece.blocks)
    if piece.blocks > 1:
        report.zero.clear()  # some rows of a vocabulary may well be zero
    if problems := report.problems():
        raise ModelError(f"the weights of {reader.path} are unusable: {'; '.join(problems)}; download them again")
    return value.to(piece.dtype).reshape(*(1 for _ in tensor.part.place), *piece.sizes)


def _common(hf: HFModelConfig, arguments: Namespace) -> dict[str, Any]:
    return {
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "taopd": {"extra_state": {}, "layout": None, "optimizer": None, "real_vocab_size": hf.vocab_size},
        "content_metadata": dict(METADATA),
    }


def _reason_to_keep(directory: Path) -> str | None:
    others = sorted(path.name for path in directory.iterdir() if path.name not in (layout.TRACKER, layout.RELEASE))
    if others or not (directory / layout.RELEASE / ".metadata").is_file():
        return f"it is no converted checkpoint (it has {', '.join(others[:3]) or 'nothing known'})"
    return None
