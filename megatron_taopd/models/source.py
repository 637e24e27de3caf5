"""Where a model comes from: an HF directory, or a Megatron checkpoint that keeps one inside."""

from __future__ import annotations

from pathlib import Path

from megatron_taopd.errors import ModelError

_TRACKER = "latest_checkpointed_iteration.txt"


def is_megatron_checkpoint(source: str | Path) -> bool:
    """Whether ``source`` is the root of a Megatron checkpoint or one of its ``iter_*`` directories."""
    source = Path(source)
    return (source / _TRACKER).is_file() or (source.name.startswith("iter_") and (source / "hf").is_dir())


def hf_directory(source: str | Path) -> Path:
    """The HF directory (config.json, tokenizer files) of a model source.

    Args:
        source: an HF directory; the root of a Megatron checkpoint, whose newest iteration is meant; or one
            of its ``iter_*`` directories. The latter two keep HF files under ``hf/``.

    Raises:
        ModelError: there is nothing of the kind.
    """
    source = Path(source)
    if (source / "config.json").is_file():
        return source
    if not source.is_dir():
        raise ModelError(
            f"model {str(source)!r} is not a directory here; give the path of a downloaded HF model "
            "or of a Megatron checkpoint"
        )
    iteration = source
    if (source / _TRACKER).is_file():
        tracked = (source / _TRACKER).read_text(encoding="utf-8").strip()
        if not tracked.isdigit():
            raise ModelError(f"{source / _TRACKER} should hold an iteration number, not {tracked!r}")
        iteration = source / f"iter_{int(tracked):07d}"
    if (iteration / "hf" / "config.json").is_file():
        return iteration / "hf"
    raise ModelError(
        f"{iteration} has neither config.json (an HF directory) nor hf/config.json (a Megatron checkpoint)"
    )
