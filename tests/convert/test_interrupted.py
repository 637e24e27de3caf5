"""Killed at any moment and run again, a conversion gives what an undisturbed one gives; nothing else is touched."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_taopd.convert import workspace as workspace_module
from megatron_taopd.convert.to_hf import convert_to_hf
from megatron_taopd.convert.to_megatron import convert_to_megatron
from megatron_taopd.convert.workspace import Workspace
from megatron_taopd.errors import ConfigError
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.convert.models import assert_same_bytes

SHARD = 150_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_hf_model(
        tmp_path_factory.mktemp("hf") / "model", "qwen2", num_layers=8, hidden_size=128, ffn_size=320
    )


def to_megatron(source: Path, out: Path) -> None:
    convert_to_megatron(source, out, max_shard_bytes=SHARD)


def to_hf(source: Path, out: Path) -> None:
    convert_to_hf(source, out, max_shard_bytes=SHARD)


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("undisturbed")
    to_megatron(model, root / "megatron")
    to_hf(root / "megatron", root / "hf")
    return {"hf-to-megatron": root / "megatron", "megatron-to-hf": root / "hf"}


def _contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def _killed(work: Callable[[], None], moment: Callable[[], bool]) -> None:
    """Run ``work`` in a process of its own and kill it at a moment seen from outside."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while not moment():
        assert time.monotonic() < deadline, "the moment never came"
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before the moment came"
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)


def _lines(partial: Path) -> int:
    manifest = partial / "manifest.jsonl"
    return manifest.read_bytes().count(b"\n") if manifest.exists() else 0


def _being_written(partial: Path) -> bool:
    """A data file is there of which the manifest does not know yet."""
    found = [path for path in (partial / "out").rglob("*") if path.suffix in (".distcp", ".safetensors")]
    return len(found) > max(_lines(partial) - 1, 0)


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "begun": lambda partial: _lines(partial) >= 1,
    "in the first file": _being_written,
    "after three files": lambda partial: _lines(partial) >= 4,
    "in a later file": lambda partial: _lines(partial) >= 6 and _being_written(partial),
    "last files": lambda partial: _lines(partial) >= 12,
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_killed_and_run_again(model, undisturbed, tmp_path, direction, moment) -> None:
    source = model if direction == "hf-to-megatron" else undisturbed["hf-to-megatron"]
    convert = to_megatron if direction == "hf-to-megatron" else to_hf
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    _killed(lambda: convert(source, out), lambda: MOMENTS[moment](partial))
    assert not out.exists()
    finished = {path.name: path.stat().st_mtime_ns for path in (partial / "out").rglob("*") if path.is_file()}
    num_finished = _lines(partial) - 1
    convert(source, out)
    assert _contents(out) == _contents(undisturbed[direction])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = {path.name: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    kept = sum(again[name] == time_ns for name, time_ns in finished.items() if name in again)
    assert kept >= num_finished  # what was finished was not written a second time


def _half_done(model: Path, tmp_path: Path) -> tuple[Path, Path]:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    _killed(lambda: to_megatron(model, out), lambda: _lines(partial) >= 6)
    return out, partial / "out" / "release" / "__0_1.distcp"


def test_a_finished_file_is_not_trusted_by_its_name(model, undisturbed, tmp_path) -> None:
    out, file = _half_done(model, tmp_path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    to_megatron(model, out)
    assert _contents(out) == _contents(undisturbed["hf-to-megatron"])


def test_other_sources_or_options_start_anew(model, undisturbed, tmp_path) -> None:
    out, _ = _half_done(model, tmp_path)
    convert_to_megatron(model, out, max_shard_bytes=SHARD, make_vocab_size_divisible_by=64 * 3)
    convert_to_hf(out, tmp_path / "hf")
    assert_same_bytes(model, tmp_path / "hf")
    assert _contents(out) != _contents(undisturbed["hf-to-megatron"])


def test_killed_between_renaming_and_cleaning_up(model, undisturbed, tmp_path, monkeypatch) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"

    def publish_and_wait(self: Workspace) -> None:
        os.rename(self.content, self.out_dir)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(workspace_module.Workspace, "publish", publish_and_wait)
        _killed(lambda: to_megatron(model, out), out.exists)
    assert partial.exists()
    to_megatron(model, out)
    assert not partial.exists()
    assert _contents(out) == _contents(undisturbed["hf-to-megatron"])
    with pytest.raises(ConfigError, match="out exists; give another --output, or --overwrite"):
        to_megatron(model, out)


def test_what_is_there_is_replaced_only_when_told_and_of_the_kind(model, undisturbed, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    to_megatron(model, out)  # an empty directory is no obstacle
    (out / "release" / "common.pt").unlink()
    convert_to_megatron(model, out, max_shard_bytes=SHARD, overwrite=True)
    assert _contents(out) == _contents(undisturbed["hf-to-megatron"])
    (out / "iter_0000010").mkdir()
    with pytest.raises(ConfigError, match="not replaced by --overwrite: .*iter_0000010"):
        convert_to_megatron(model, out, overwrite=True)
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="no HF model directory"):
        convert_to_hf(undisturbed["hf-to-megatron"], thesis, overwrite=True)
    to_hf(undisturbed["hf-to-megatron"], tmp_path / "hf")
    (tmp_path / "hf" / "old.txt").write_text("of an earlier model")
    convert_to_hf(undisturbed["hf-to-megatron"], tmp_path / "hf", max_shard_bytes=SHARD, overwrite=True)
    assert _contents(tmp_path / "hf") == _contents(undisturbed["megatron-to-hf"])
    assert not list(tmp_path.glob(".*"))


def test_two_at_once(model, tmp_path) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    first = os.fork()
    if first == 0:
        try:
            to_megatron(model, out)
        finally:
            os._exit(0)
    while _lines(partial) < 3:
        assert os.waitpid(first, os.WNOHANG) == (0, 0)
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(ConfigError, match="another process is making"):
        to_megatron(model, out)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    to_megatron(model, out)
