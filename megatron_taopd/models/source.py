"""Where a model comes from: an HF directory, or a Megatron checkpoint that keeps one inside."""

from __future__ import annotations

from pathlib import Path

from megatron_taopd.checkpoint.layout import hf_files_dir, is_megatron_checkpoint
from megatron_taopd.errors import ModelError

__all__ = ["hf_directory", "is_megatron_checkpoint"]


def hf_directory(source: str | Path) -> Path:
    """The HF directory (config.json, tokenizer files) of a model source.

    Args:
        source: an HF directory; the root of a Megatron checkpoint, whose newest iteration is meant; or one
            of its ``iter_*`` or ``release`` directories. The latter two keep HF files under ``hf/``.

    Raises:
        ModelError: there is nothing of the kind.
        CheckpointError: a Megatron checkpoint without HF files, or whose tracker file is of no use.
    """
    source = Path(source)
    if (source / "config.json").is_file():
        return source
    if not source.is_dir():
        raise ModelError(
            f"model {str(source)!r} is not a directory here; give the path of a downloaded HF model "
            "or of a Megatron checkpoint"
        )
    if not is_megatron_checkpoint(source):
        raise ModelError(f"{source} has neither config.json (an HF directory) nor a Megatron checkpoint's tracker file")
    return hf_files_dir(source)
