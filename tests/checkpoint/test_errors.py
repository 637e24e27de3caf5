"""What is wrong with a checkpoint is said on every rank, before anything is changed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_taopd.checkpoint import (
    hf_files_dir,
    is_megatron_checkpoint,
    load_model_weights,
    read_latest_iteration,
    save_checkpoint,
)
from megatron_taopd.errors import CheckpointError
from megatron_taopd.models.build import load_model
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.testing import WorkerPool
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.checkpoint.runs import Kind, Run

Pools = Callable[[int], WorkerPool]
TRACKER = "latest_checkpointed_iteration.txt"
RANKS = 2


def _model(path: Path, **changes: int) -> Path:
    sizes = {"num_layers": 2, "hidden_size": 32, "ffn_size": 48, **changes}
    return save_tiny_hf_model(path, "llama", **sizes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = _model(tmp_path_factory.mktemp("model"))
    (path / "tokenizer.json").write_text("{}")
    (path / "README.md").write_text("about")
    (path / "modeling_custom.py").write_text("print('no')")
    return path


@pytest.fixture(scope="module")
def saved(pool: Pools, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    pool(RANKS).run(_save, model, directory)
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def _save(model: Path, directory: Path) -> None:
    run = Run(model, Kind(tp=2))
    run.steps(0, 1)
    run.save(directory, 3, config={"lr": 0.5}, hf_source=model)


def _load(model: Path, directory: Path, kind: Kind) -> str:
    """The error; the run must be unchanged by it."""
    run = Run(model, kind)
    before = run.weights()
    try:
        run.load(directory)
    except CheckpointError as error:
        assert all(torch.equal(value, before[name]) for name, value in run.weights().items())
        return str(error)
    return "no error"


def _refused(pool: Pools, model: Path, directory: Path, kind: Kind | None = None) -> str:
    answers = pool(RANKS).run(_load, model, directory, kind or Kind(tp=2))
    assert len(set(answers)) == 1, answers
    return answers[0]


def test_files_of_a_checkpoint(saved: Path, model: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["iter_0000003", TRACKER]
    assert (saved / TRACKER).read_text() == "3\n"
    assert read_latest_iteration(saved) == 3
    assert json.loads((saved / "iter_0000003/run_config.json").read_text()) == {"lr": 0.5}
    assert is_megatron_checkpoint(saved) and is_megatron_checkpoint(saved / "iter_0000003")
    assert not is_megatron_checkpoint(model)
    hf = hf_files_dir(saved)
    assert hf == hf_files_dir(saved / "iter_0000003") == saved / "iter_0000003/hf"
    assert sorted(path.name for path in hf.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
    ]


def test_missing_directory_tracker_and_iteration(pool: Pools, model: Path, copied: Path) -> None:
    assert "does not exist" in _refused(pool, model, copied / "nowhere")
    (copied / TRACKER).write_text("12")
    message = _refused(pool, model, copied)
    assert "has no iter_0000012" in message and "found: iter_0000003" in message
    (copied / TRACKER).write_text("twelve")
    assert "'twelve' instead of an iteration number" in _refused(pool, model, copied)
    (copied / TRACKER).unlink()
    assert f"{TRACKER} is missing" in _refused(pool, model, copied)
    assert read_latest_iteration(copied) is None
    assert read_latest_iteration(copied / "nowhere") is None
    with pytest.raises(CheckpointError, match="is not iteration 4"):
        hf_files_dir(copied / "iter_0000003", 4)
    shutil.rmtree(copied / "iter_0000003/hf")
    with pytest.raises(CheckpointError, match="architecture of its model is not known"):
        hf_files_dir(copied, 3)


def test_a_file_is_gone(pool: Pools, model: Path, copied: Path) -> None:
    directory = copied / "iter_0000003"
    files = [file for file in directory.iterdir() if file.is_file() and file.name != "run_config.json"]
    # Releases of megatron-core differ in the rest: common.pt, more shards a rank.
    assert {file.name for file in files} >= {".metadata", "metadata.json", "__0_0.distcp", "__1_0.distcp"}
    for file in files:
        content = file.read_bytes()
        file.unlink()
        message = _refused(pool, model, copied)
        assert "is incomplete" in message and f"no {file.name};" in message
        file.write_bytes(content)


def test_a_file_is_torn(pool: Pools, model: Path, copied: Path) -> None:
    for name, expected in (
        ("__0_0.distcp", "is torn: __0_0.distcp"),
        (".metadata", "cannot be used: .metadata"),
    ):
        file = copied / "iter_0000003" / name
        os.truncate(file, file.stat().st_size - 100)
        assert expected in _refused(pool, model, copied)


class _Payload:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo gotcha > PLACE",)


def test_code_in_the_index_does_not_run(pool: Pools, model: Path, copied: Path, tmp_path: Path) -> None:
    place = tmp_path / "executed"
    payload = pickle.dumps(_Payload(), protocol=0).replace(b"PLACE", str(place).encode())
    (copied / "iter_0000003/.metadata").write_bytes(payload)
    assert re.search(r"(posix|nt)\.system does not belong", _refused(pool, model, copied))
    assert not place.exists()


def test_checkpoint_of_another_model(pool: Pools, saved: Path, tmp_path: Path) -> None:
    for changes, expected in (
        ({"num_layers": 4}, r"has shape \(2, .*\) in the checkpoint and \(4, .*\) in this run"),
        ({"ffn_size": 64}, r"mlp.linear_fc\d.weight has shape"),
        ({"vocab_size": 501}, "its vocabulary has 509 tokens and this run's 501"),
    ):
        other = _model(tmp_path / str(changes), **changes)
        message = _refused(pool, other, saved)
        assert "is not of this model" in message and re.search(expected, message), message
    tied = save_tiny_hf_model(tmp_path / "qwen", "qwen3", num_layers=2, hidden_size=32, ffn_size=48)
    assert re.search(r"[qk]_layernorm.weight is missing", _refused(pool, tied, saved))


@pytest.mark.parametrize(
    "kind",
    [
        Kind(tp=2, optimizer="sgd"),
        Kind(tp=2, bf16=True),
        Kind(tp=2, distributed_optimizer=True),
    ],
    ids=["sgd", "bf16", "distributed"],
)
def test_checkpoint_of_another_optimizer(pool: Pools, model: Path, saved: Path, kind: Kind) -> None:
    message = _refused(pool, model, saved, kind)
    assert "holds the state of adam in FP32Optimizer and this run uses" in message


def _weights_only(model: Path, directory: Path) -> tuple[str, bool]:
    """Save weights alone; what a resume says of it, and whether it serves as a model."""
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    run = Run(model, Kind(tp=2))
    run.steps(0, 1)
    save_checkpoint(directory, iteration=1, module=run.module, hf_source=model)
    teacher = load_model(directory, parallel, params_dtype=torch.bfloat16, trainable=False).module
    same = all(torch.equal(value, run.weights()[name].bfloat16()) for name, value in teacher.named_parameters())
    try:
        run.load(directory)
    except CheckpointError as error:
        return str(error), same
    return "no error", same


def test_weights_alone_make_a_teacher_but_no_resume(pool: Pools, model: Path, tmp_path: Path) -> None:
    for message, same in pool(RANKS).run(_weights_only, model, tmp_path):
        assert same
        assert "weights alone, no optimizer state" in message


def _save_in_vain(model: Path, directory: Path) -> list[str]:
    run = Run(model, Kind(tp=2))
    messages = []
    for options in ({"hf_source": directory}, {"extra_state": {"path": Kind()}}):
        try:
            run.save(directory, 4, **options)
        except (CheckpointError, pickle.UnpicklingError) as error:
            messages.append(str(error))
    return messages


def test_a_failed_save_leaves_the_old_checkpoint(pool: Pools, model: Path, copied: Path) -> None:
    for messages in pool(RANKS).run(_save_in_vain, model, copied):
        assert "no config.json" in messages[0]
        assert "Kind" in messages[1]
    assert read_latest_iteration(copied) == 3
    assert not (copied / "iter_0000004").exists()
    pool(RANKS).run(_save, model, copied)  # the same iteration once more, over leftovers
    assert sorted(path.name for path in copied.iterdir()) == ["iter_0000003", TRACKER]
    assert "no error" == _refused_or_not(pool, model, copied)


def _refused_or_not(pool: Pools, model: Path, directory: Path) -> str:
    return pool(RANKS).run(_load, model, directory, Kind(tp=2))[0]


def _knobs_after_resume(model: Path, directory: Path) -> tuple[float, float, int]:
    run = Run(model, Kind(tp=2, lr=0.5))
    run.load(directory)
    run.scheduler.step(increment=1)
    group = run.optimizer.param_groups[0]
    return group["max_lr"], group["lr"], run.scheduler.num_steps


def test_the_learning_rate_is_that_of_the_resumed_run(pool: Pools, model: Path, saved: Path) -> None:
    max_lr, lr, steps = pool(RANKS).run(_knobs_after_resume, model, saved)[0]
    assert (max_lr, steps) == (0.5, 2)
    assert lr == pytest.approx(0.5, rel=0.2)


def test_in_one_process(model: Path, pool: Pools, saved: Path, tmp_path: Path) -> None:
    """Saved by two ranks, read by one that nobody started with torchrun's environment."""
    assert pool(1).run(_read_in_one, model, saved) == [3]


def _read_in_one(model: Path, directory: Path) -> int:
    parallel = ParallelConfig()
    distributed.initialize(parallel, seed=1)
    loaded = load_model(model, parallel, params_dtype=torch.float32, trainable=False)
    return load_model_weights(directory, loaded.module)
