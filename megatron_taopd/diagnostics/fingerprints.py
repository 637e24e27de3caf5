"""Short names for what a bank was made with, to notice that it is something else today."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_taopd.checkpoint.layout import find_iteration, is_megatron_checkpoint
from megatron_taopd.data.tokenizer import load_tokenizer
from megatron_taopd.diagnostics.hashes import hash_object
from megatron_taopd.models.source import hf_directory

_BLOCK = 4096
_NUM_BLOCKS = 64
_HEAD = 2**20  # holds the names and shapes of a safetensors file
_WEIGHTS = (".safetensors", ".distcp", ".bin")


def model_fingerprint(source: str | Path) -> str:
    """Of the weight files of a model directory: names, sizes, and a sample of bytes from all over each.

    Reading all of a large model takes minutes; training moves every weight, so a sample shows it. The same weights in
    another format (Hugging Face, Megatron) have another fingerprint.
    """
    digest = hashlib.sha256()
    directory = find_iteration(source)[0] if is_megatron_checkpoint(source) else Path(source)
    digest.update((hf_directory(source) / "config.json").read_bytes())
    for file in sorted(path for path in directory.iterdir() if path.suffix in _WEIGHTS):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(_HEAD))
            for block in range(_NUM_BLOCKS):
                stream.seek(size * block // _NUM_BLOCKS)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(source: str | Path) -> str | None:
    """Of the meaning of every token id; None for a model without a tokenizer."""
    tokenizer = load_tokenizer(source)
    return None if tokenizer is None else hash_object(tokenizer.get_vocab())[:16]
