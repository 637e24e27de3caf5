"""What can happen to a checkpoint while it is written and afterwards: nothing that was whole is lost."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_taopd.checkpoint import begin_saving, load_newest_checkpoint, publishing, read_latest_iteration
from megatron_taopd.checkpoint.layout import TRACKER, iterations, write_latest_iteration
from megatron_taopd.errors import CheckpointError
from megatron_taopd.testing import WorkerPool
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.checkpoint.runs import Kind, Run
from tests.needs import missing

Pools = Callable[[int], WorkerPool]
KIND = Kind(tp=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_hf_model(tmp_path_factory.mktemp("model"), "llama", num_layers=2, hidden_size=32, ffn_size=48)


@pytest.fixture(scope="module")
def saved(pool: Pools, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Iterations 1, 2 and 3."""
    directory = tmp_path_factory.mktemp("checkpoints")
    pool(2).run(_save_three, model, directory)
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def _save_three(model: Path, directory: Path) -> None:
    run = Run(model, KIND)
    for iteration in (1, 2, 3):
        run.steps(iteration - 1, 1)
        run.save(directory, iteration, extra_state={"of": iteration})


def _resume(model: Path, directories: list[Path], is_own: bool) -> list[str]:
    """Of each directory the state that was found there, or the error."""
    run = Run(model, KIND)
    answers = []
    for directory in directories:
        try:
            loaded = load_newest_checkpoint(
                directory, module=[run.module], optimizer=run.optimizer, scheduler=run.scheduler, is_own=is_own
            )
        except CheckpointError as error:
            answers.append(str(error))
        else:
            answers.append("new" if loaded is None else f"{loaded.iteration} {loaded.extra_state['of']}")
    return answers


def resume(pool: Pools, model: Path, *directories: Path, is_own: bool = True) -> list[str]:
    first, second = pool(2).run(_resume, model, list(directories), is_own)
    assert first == second
    return first


def spoil(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_sums_are_those_of_sha256sum(saved: Path) -> None:
    for iteration in (1, 3):
        path = saved / f"iter_{iteration:07d}"
        checked = subprocess.run(
            ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stderr
        names = set(re.findall("^(.+): OK$", checked.stdout, re.MULTILINE))
        there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        assert names == there - {"SHA256SUMS"}


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    pool: Pools, model: Path, copied: Path, tmp_path: Path
) -> None:
    untouched = {}
    for name in ("__1_0.distcp", "rng/rank_00001.pt", "SHA256SUMS"):
        case = shutil.copytree(copied, tmp_path / name.replace("/", "-"))
        spoil(case / "iter_0000003" / name)
        untouched[case] = "2 2"
    torn = shutil.copytree(copied, tmp_path / "torn")
    os.truncate(torn / "iter_0000003/__0_0.distcp", 100)
    (torn / "iter_0000002/SHA256SUMS").unlink()
    untouched[torn] = "1 1"
    assert resume(pool, model, *untouched) == list(untouched.values())
    for case, found in untouched.items():
        assert read_latest_iteration(case) == int(found[0])
        damaged = sorted(path.name for path in case.glob("*.damaged"))
        assert damaged == [f"iter_{number:07d}.damaged" for number in range(int(found[0]) + 1, 4)]

    lost = shutil.copytree(copied, tmp_path / "lost")
    for path in lost.glob("iter_*"):
        spoil(path / "__0_0.distcp")
    (message,) = resume(pool, model, lost)
    assert message.startswith(f"no checkpoint of {lost} is whole: ")
    for iteration in (1, 2, 3):
        assert f"{lost}/iter_{iteration:07d} is damaged: __0_0.distcp has other bytes than were written" in message
    assert iterations(lost) == [3, 2, 1]


def test_the_directory_of_another_run_is_left_as_it_is(pool: Pools, model: Path, copied: Path) -> None:
    spoil(copied / "iter_0000003/__0_0.distcp")
    assert resume(pool, model, copied, copied / "iter_0000002", is_own=False) == ["2 2", "2 2"]
    assert iterations(copied) == [3, 2, 1] and read_latest_iteration(copied) == 3


def test_whatever_moment_a_save_is_cut_off_at(pool: Pools, model: Path, copied: Path, tmp_path: Path) -> None:
    def case(name: str) -> Path:
        return shutil.copytree(copied, tmp_path / name)

    while_writing = case("while_writing")
    shutil.copytree(while_writing / "iter_0000003", while_writing / ".iter_0000004.partial-0a1b2c3d")
    published = case("published")  # the tracker is written after the rename
    write_latest_iteration(published, 2)
    while_replacing = case("while_replacing")
    os.rename(while_replacing / "iter_0000003", while_replacing / ".iter_0000003.replaced")
    first_ever = case("first_ever")
    (first_ever / TRACKER).unlink()
    torn_tracker = case("torn_tracker")
    (torn_tracker / TRACKER).write_text("")
    deleted_by_hand = case("deleted_by_hand")
    shutil.rmtree(deleted_by_hand / "iter_0000003")
    nothing = tmp_path / "nothing"
    cases = [
        while_writing, published, while_replacing, first_ever, torn_tracker, deleted_by_hand, nothing,
    ]  # fmt: skip
    assert resume(pool, model, *cases) == ["3 3", "2 2", "3 3", "3 3", "3 3", "2 2", "new"]
    assert not list(tmp_path.glob("*/.iter_*"))
    nothing.mkdir()
    answers = resume(pool, model, nothing, tmp_path / "elsewhere", is_own=False)
    assert "holds no checkpoint" in answers[0] and "does not exist" in answers[1]


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    for name in ("iter_0000001", "iter_0000002.damaged", "iter_0000004", "iter_0000006", "iter_0000007.damaged"):
        (tmp_path / name).mkdir()
    for name in ("iter_0000008", "iter_0000009", "release"):  # 9 is of a run that went back
        (tmp_path / name).mkdir()
    publishing.keep_last(tmp_path, 2, newest=8)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["iter_0000006", "iter_0000007.damaged", "iter_0000008", "iter_0000009", "release"]


@contextlib.contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond; as a full disk, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _save_without_space(model: Path, directory: Path) -> list[str]:
    """Saves that meet a limit at different points, on rank 0 or both; then one that succeeds."""
    run = Run(model, KIND)
    run.steps(0, 1)
    run.save(directory, 1, extra_state={"of": 1})
    rank = torch.distributed.get_rank()
    errors = []
    for limited_ranks, size, in_background, when in (
        ((0, 1), 500, False, "all"),  # common.pt on rank 0, random states on both
        ((1,), 20_000, False, "all"),  # one rank's tensors
        ((1,), 20_000, True, "all"),
        ((0,), 500, False, "end"),  # the index
    ):
        limit = _file_size_limit(size) if rank in limited_ranks else contextlib.nullcontext()
        try:
            with limit if when == "all" else contextlib.nullcontext():
                options = {"module": [run.module], "optimizer": run.optimizer, "scheduler": run.scheduler}
                pending = begin_saving(directory, iteration=2, in_background=in_background, **options)
            with limit if when == "end" else contextlib.nullcontext():
                pending.finish()
        except CheckpointError as error:
            errors.append(str(error))
    run.save(directory, 3, extra_state={"of": 3}, keep_last=1)
    return errors


def test_no_space_is_said_on_all_ranks_and_the_last_good_one_stays(pool: Pools, model: Path, tmp_path: Path) -> None:
    first, second = pool(2).run(_save_without_space, model, tmp_path)
    assert first == second and len(first) == 4
    for message in first:
        assert message.startswith(f"cannot write checkpoint {tmp_path}/iter_0000002: ")
        assert "File too large" in message and "(iter_0000001 is still the newest; " in message
    assert [re.search(r"rank \d", message)[0] for message in first] == ["rank 0", "rank 1", "rank 1", "rank 0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000003", TRACKER]
    assert resume(pool, model, tmp_path) == ["3 3"]


def _save_once(model: Path, directory: Path) -> str:
    run = Run(model, KIND)
    run.steps(0, 1)
    try:
        run.save(directory, 4)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_full_disk_and_a_read_only_one(pool: Pools, model: Path, copied: Path, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    size = sum(file.stat().st_size for file in (copied / "iter_0000003").rglob("*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size + size // 2}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        missing("mounting a small file system is not permitted", "run the tests as root")
    try:
        one = place / "checkpoints"
        one.mkdir()
        shutil.copytree(copied / "iter_0000003", one / "iter_0000003")
        write_latest_iteration(one, 3)
        messages = pool(2).run(_save_once, model, one)
        assert messages[0] == messages[1]
        assert "No space left on device" in messages[0] and "iter_0000003 is still the newest" in messages[0]
        assert sorted(path.name for path in one.iterdir()) == ["iter_0000003", TRACKER]
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        messages = pool(2).run(_save_once, model, one)
        assert messages[0] == messages[1]
        assert "Read-only file system" in messages[0] and "iter_0000003 is still the newest" in messages[0]
        assert "Read-only file system" in (publishing.why_not_writable(one) or "")
        assert resume(pool, model, one) == ["3 3"]
    finally:
        subprocess.run(["umount", place], check=True)


def _save_while_training(model: Path, directory: Path) -> list[str]:
    """Three saves in the background: one goes through, with SIGTERM to the writers; of one a writer is killed."""
    run = Run(model, KIND)
    answers = []
    for iteration, number in ((1, signal.SIGTERM), (2, signal.SIGKILL), (3, None)):
        run.steps(iteration - 1, 1)
        pending = begin_saving(
            directory,
            iteration=iteration,
            module=[run.module],
            optimizer=run.optimizer,
            scheduler=run.scheduler,
            extra_state={"of": iteration},
            in_background=True,
        )
        assert pending._writer is not None
        if number is not None and (number == signal.SIGTERM or torch.distributed.get_rank() == 1):
            os.kill(pending._writer._process.pid, signal.SIGSTOP)  # so that it is not too quick
            os.kill(pending._writer._process.pid, number)
            answers.append(str(pending.done()))
            os.kill(pending._writer._process.pid, signal.SIGCONT)
        else:
            pending.done()
        run.steps(iteration, 1)
        try:
            pending.finish()
        except CheckpointError as error:
            answers.append(str(error))
    return answers


def _weights_after_steps(model: Path) -> list[dict[str, torch.Tensor]]:
    run = Run(model, KIND)
    run.steps(0, 1)
    return [run.weights()]


def _weights_of(model: Path, directory: Path) -> list[dict[str, torch.Tensor]]:
    run = Run(model, KIND)
    run.load(directory, iteration=1)
    return [run.weights()]


def test_saving_in_the_background(pool: Pools, model: Path, tmp_path: Path) -> None:
    first, second = pool(2).run(_save_while_training, model, tmp_path)
    assert first[0] == "False"
    assert "rank 1: its writer process died (exit code -9) (iter_0000001 is still the newest" in first[-1]
    assert first[-1] == second[-1]
    assert iterations(tmp_path) == [3, 1]
    # The checkpoint is of the moment when the save began: the step that followed is not in it.
    straight, stored = pool(2).run(_weights_after_steps, model), pool(2).run(_weights_of, model, tmp_path)
    for (wanted,), (found,) in zip(straight, stored, strict=True):
        for name, weight in wanted.items():
            assert torch.equal(found[name], weight), name
