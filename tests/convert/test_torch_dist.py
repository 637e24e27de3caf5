"""Regions of stored tensors, put together from the chunks that hold them and no others."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from megatron_taopd.convert import torch_dist
from megatron_taopd.convert.torch_dist import CheckpointReader, Chunk, IndexWriter, write_chunk
from megatron_taopd.errors import CheckpointError

LAYERS, EXPERTS, ROWS, COLUMNS = 3, 16, 4, 6
KEY = "decoder.layers.mlp.experts.experts.linear_fc2.weight"


@pytest.fixture()
def whole() -> torch.Tensor:
    return torch.arange(LAYERS * EXPERTS * ROWS * COLUMNS, dtype=torch.float32).view(LAYERS, EXPERTS, ROWS, COLUMNS)


@pytest.fixture()
def reader(tmp_path: Path, whole: torch.Tensor) -> CheckpointReader:
    """Experts, each cut in two columns as by two tensor-parallel ranks; one half of the last is missing."""
    index = IndexWriter()
    half = COLUMNS // 2
    with open(tmp_path / "__0_0.distcp", "wb") as stream:
        for layer, expert, part in itertools.product(range(LAYERS), range(EXPERTS), range(2)):
            if (layer, expert, part) == (LAYERS - 1, EXPERTS - 1, 1):
                continue
            offsets, sizes = (layer, expert, 0, part * half), (1, 1, ROWS, half)
            start, length = write_chunk(stream, whole[layer, expert, :, part * half :][None, None, :, :half])
            index.add(Chunk(KEY, tuple(whole.shape), whole.dtype, offsets, sizes, "__0_0.distcp", start, length))
    index.write(tmp_path, {})
    return CheckpointReader(tmp_path)


def test_an_expert_is_looked_for_in_its_place_alone(
    reader: CheckpointReader, whole: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = []
    original = torch_dist.create_read_items_for_chunk_list

    def counting(key, entry, regions):
        looked_at.append(len(entry.chunks))
        return original(key, entry, regions)

    monkeypatch.setattr(torch_dist, "create_read_items_for_chunk_list", counting)
    for layer, expert in itertools.product(range(LAYERS), range(EXPERTS - 1)):
        value = reader.read(KEY, (layer, expert, 0, 0), (1, 1, ROWS, COLUMNS))
        assert torch.equal(value[0, 0], whole[layer, expert])
    assert set(looked_at) == {2}
    assert torch.equal(reader.read(KEY, (0, 3, 1, 2), (2, 5, 2, 3)), whole[:2, 3:8, 1:3, 2:5])  # over many


def test_what_no_chunk_holds(reader: CheckpointReader) -> None:
    with pytest.raises(CheckpointError, match="has 12 of 24 values of decoder.layers.mlp.experts"):
        reader.read(KEY, (LAYERS - 1, EXPERTS - 1, 0, 0), (1, 1, ROWS, COLUMNS))
    with pytest.raises(CheckpointError, match="has 0 of 24 values"):
        reader.read(KEY, (LAYERS, 0, 0, 0), (1, 1, ROWS, COLUMNS))
