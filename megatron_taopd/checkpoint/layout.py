"""Where things lie inside a checkpoint directory. Nothing here imports Megatron."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_taopd.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""In the tracker and as directory name: weights that no training run here produced, such as converted ones."""
HF_FILES = "hf"
RANDOM_STATES = "rng"
RUN_CONFIG = "run_config.json"
DAMAGED_SUFFIX = ".damaged"

# Of a Hugging Face directory everything is kept beside the checkpoint but weights and code.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_CODE_SUFFIXES = (".py", ".pyc", ".so")
_NAME = re.compile(rf"iter_\d{{7,}}|{RELEASE}")


def iteration_name(iteration: int) -> str:
    """``iter_0000010`` for 10."""
    return f"iter_{iteration:07d}"


def read_latest_iteration(directory: str | Path) -> int | None:
    """Iteration of the newest complete checkpoint, 0 for a release; None where there is no checkpoint yet.

    Raises:
        CheckpointError: the tracker file does not hold a number or ``release``.
    """
    name = latest_name(directory)
    return None if name is None else _iteration_of(name)


def latest_name(directory: str | Path) -> str | None:
    """Directory name of the newest complete checkpoint; None where there is none yet.

    Raises:
        CheckpointError: as :func:`read_latest_iteration`.
    """
    tracker = Path(directory) / TRACKER
    try:
        text = tracker.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if text == RELEASE:
        return RELEASE
    if not text.isdecimal():
        raise CheckpointError(
            f"{tracker} holds {text[:40]!r} instead of an iteration number; write the number of one of these "
            f"there: {_found(directory)}"
        )
    return iteration_name(int(text))


def _iteration_of(name: str) -> int:
    return 0 if name == RELEASE else int(name.removeprefix("iter_"))


def iterations(directory: str | Path) -> list[int]:
    """The checkpoints that are there, newest first, whatever the tracker says; a release is none of them."""
    names = (path.name for path in Path(directory).glob("iter_*") if path.is_dir())
    return sorted((_iteration_of(name) for name in names if _NAME.fullmatch(name)), reverse=True)


def damaged(directory: str | Path) -> list[tuple[int, Path]]:
    """Checkpoints that were found damaged and set aside."""
    paths = list(Path(directory).glob(f"iter_*{DAMAGED_SUFFIX}"))
    return sorted((_iteration_of(path.name.removesuffix(DAMAGED_SUFFIX)), path) for path in paths)


def write_latest_iteration(directory: Path, iteration: int) -> None:
    """Replace the tracker file in one step."""
    _write_tracker(directory, str(iteration))


def write_latest_release(directory: Path) -> None:
    """The same for a checkpoint in ``release``."""
    _write_tracker(directory, RELEASE)


def _write_tracker(directory: Path, text: str) -> None:
    aside = directory / f".{TRACKER}.partial"
    with open(aside, "w") as stream:
        stream.write(f"{text}\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, directory / TRACKER)


def find_iteration(directory: str | Path, iteration: int | None = None) -> tuple[Path, int]:
    """Directory and number of a checkpoint.

    Args:
        directory: the checkpoint directory, or one ``iter_*`` or ``release`` directory itself.
        iteration: None takes the newest.

    Raises:
        CheckpointError: there is no such directory or no such checkpoint in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint directory {directory} does not exist")
    if is_one_checkpoint(directory):
        own = _iteration_of(directory.name)
        if iteration not in (None, own):
            raise CheckpointError(f"{directory} is not iteration {iteration}; give its parent directory")
        return directory, own
    name = latest_name(directory) if iteration is None else iteration_name(iteration)
    if name is None:
        raise CheckpointError(f"{directory} holds no checkpoint: {TRACKER} is missing (found: {_found(directory)})")
    path = directory / name
    if not path.is_dir():
        raise CheckpointError(
            f"{directory} has no {path.name} (found: {_found(directory)}); write the number of one that "
            f"exists to {TRACKER}, or remove the directory to start anew"
        )
    return path, _iteration_of(name)


def is_one_checkpoint(directory: Path) -> bool:
    """Whether a path names one checkpoint itself, rather than a directory of them."""
    return _NAME.fullmatch(directory.name) is not None and not (directory / TRACKER).exists()


def is_megatron_checkpoint(directory: str | Path) -> bool:
    """Whether this is a checkpoint directory, or one ``iter_*`` or ``release`` directory of it."""
    directory = Path(directory)
    inner = _NAME.fullmatch(directory.name) and (
        (directory / "metadata.json").is_file() or (directory / HF_FILES).is_dir()
    )
    return bool(inner) or (directory / TRACKER).is_file()


def hf_files_dir(directory: str | Path, iteration: int | None = None) -> Path:
    """Directory with ``config.json``, tokenizer and generation config of a checkpoint's model.

    Raises:
        CheckpointError: no checkpoint, or one that was saved without these files.
    """
    path, _ = find_iteration(directory, iteration)
    if not (path / HF_FILES / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no {HF_FILES}/config.json, so the architecture of its model is not known; put "
            f"the files of the original Hugging Face directory (without weights) into {path / HF_FILES}"
        )
    return path / HF_FILES


def read_saved_config(checkpoint: Path) -> dict[str, Any] | None:
    """The configuration of the run that wrote a checkpoint; None where there is none to read."""
    try:
        return json.loads((checkpoint / RUN_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def copy_hf_files(source: str | Path, target: Path) -> None:
    """Copy config, generation config, tokenizer and chat template; weights and code stay behind.

    Raises:
        CheckpointError: ``source`` has no ``config.json``.
    """
    source = Path(source)
    if not (source / "config.json").is_file():
        raise CheckpointError(f"{source} has no config.json to keep beside the checkpoint")
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name.endswith(_WEIGHT_SUFFIXES + _CODE_SUFFIXES):
            continue
        if path.is_file():
            shutil.copyfile(path, target / path.name)
        elif path.name == "additional_chat_templates":
            shutil.copytree(path, target / path.name)


def _found(directory: str | Path) -> str:
    names = sorted(path.name for path in Path(directory).glob("*") if path.is_dir() and _NAME.fullmatch(path.name))
    return ", ".join(names) or "no iter_* directories"
