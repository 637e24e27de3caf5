"""Where things lie inside a checkpoint directory. Nothing here imports Megatron."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megatron_taopd.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
HF_FILES = "hf"
RANDOM_STATES = "rng"
RUN_CONFIG = "run_config.json"

# Of a Hugging Face directory everything is kept beside the checkpoint but weights and code.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_CODE_SUFFIXES = (".py", ".pyc", ".so")


def iteration_name(iteration: int) -> str:
    """``iter_0000010`` for 10."""
    return f"iter_{iteration:07d}"


def read_latest_iteration(directory: str | Path) -> int | None:
    """Iteration of the newest complete checkpoint; None where there is no checkpoint yet.

    Raises:
        CheckpointError: the tracker file does not hold a number.
    """
    tracker = Path(directory) / TRACKER
    try:
        text = tracker.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not text.isdecimal():
        raise CheckpointError(
            f"{tracker} holds {text[:40]!r} instead of an iteration number; write the number of one of these "
            f"there: {_found(directory)}"
        )
    return int(text)


def write_latest_iteration(directory: Path, iteration: int) -> None:
    """Replace the tracker file in one step."""
    aside = directory / f".{TRACKER}.partial"
    with open(aside, "w") as stream:
        stream.write(f"{iteration}\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, directory / TRACKER)


def find_iteration(directory: str | Path, iteration: int | None = None) -> tuple[Path, int]:
    """Directory and number of a checkpoint.

    Args:
        directory: the checkpoint directory, or one ``iter_*`` directory itself.
        iteration: None takes the newest.

    Raises:
        CheckpointError: there is no such directory or no such checkpoint in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"checkpoint directory {directory} does not exist")
    own = re.fullmatch(r"iter_(\d{7,})", directory.name)
    if own and not (directory / TRACKER).exists():
        if iteration not in (None, int(own.group(1))):
            raise CheckpointError(f"{directory} is not iteration {iteration}; give its parent directory")
        return directory, int(own.group(1))
    if iteration is None:
        iteration = read_latest_iteration(directory)
        if iteration is None:
            raise CheckpointError(f"{directory} holds no checkpoint: {TRACKER} is missing (found: {_found(directory)})")
    path = directory / iteration_name(iteration)
    if not path.is_dir():
        raise CheckpointError(
            f"{directory} has no {path.name} (found: {_found(directory)}); write the number of one that "
            f"exists to {TRACKER}, or remove the directory to start anew"
        )
    return path, iteration


def is_megatron_checkpoint(directory: str | Path) -> bool:
    """Whether this is a checkpoint directory, or one ``iter_*`` directory of it."""
    directory = Path(directory)
    return (directory / TRACKER).is_file() or (
        directory.name.startswith("iter_") and (directory / "metadata.json").is_file()
    )


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
    names = sorted(path.name for path in Path(directory).glob("iter_*") if path.is_dir())
    return ", ".join(names) or "no iter_* directories"
