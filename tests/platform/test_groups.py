"""Laying the ranks out anew closes the groups of the last layout."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

import pytest
from megatron.core import parallel_state

from megatron_taopd import cli
from megatron_taopd.errors import ConfigError
from megatron_taopd.platform import distributed, layouts
from megatron_taopd.platform.layout import ParallelConfig, TeacherLayout
from megatron_taopd.platform.layouts import SecondLayout
from megatron_taopd.testing.tiny_models import save_tiny_hf_model

TASKS = Path("/proc/self/task")


def sizes() -> tuple[int, int, int]:
    return (
        distributed.tensor_parallel_group().size(),
        distributed.pipeline_parallel_size(),
        distributed.data_parallel_size(),
    )


def second_layouts() -> None:
    """Runs in both ranks."""
    distributed.initialize(ParallelConfig(tensor_model_parallel_size=2), seed=1)
    try:
        first = sizes()
        second = SecondLayout(ParallelConfig(pipeline_model_parallel_size=2))
        third = SecondLayout(ParallelConfig())
        for layout, wanted in ((second, (1, 2, 1)), (third, (1, 1, 2)), (second, (1, 2, 1))):
            with layout.in_force():
                assert sizes() == wanted
            assert sizes() == first == (2, 1, 1)
        with pytest.raises(KeyError), second.in_force():
            raise KeyError
        assert sizes() == first
        with pytest.raises(ConfigError, match="teacher-tensor-model-parallel-size 3"):
            SecondLayout(TeacherLayout(tensor_model_parallel_size=3))
        assert sizes() == first
    finally:
        distributed.shutdown()


def test_second_layouts_are_in_force_inside_their_blocks(pool) -> None:
    pool(2).run(second_layouts)


def test_every_global_of_megatrons_layout_is_exchanged() -> None:
    """A layout beside the first must bring its own value of each, also of those that a newer Megatron adds."""
    tree = ast.parse(inspect.getsource(parallel_state))
    rebound = {name for node in ast.walk(tree) if isinstance(node, ast.Global) for name in node.names}
    assigned = {
        target.id
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    exchanged = layouts._globals().keys()
    assert len(rebound) > 30 and {"_TENSOR_MODEL_PARALLEL_GROUP", "_global_process_group_list"} <= rebound
    assert not rebound - exchanged
    assert assigned - exchanged == {"logger"}


def threads_after_each_layout() -> list[int]:
    counts = []
    for tensor_parallel in (2, 1, 2, 1):
        distributed.initialize(ParallelConfig(tensor_model_parallel_size=tensor_parallel), seed=1)
        SecondLayout(ParallelConfig(pipeline_model_parallel_size=tensor_parallel))
        distributed.shutdown()
        counts.append(len(list(TASKS.iterdir())))
    return counts


@pytest.mark.skipif(not TASKS.exists(), reason="counts threads in /proc")
def test_no_thread_outlives_a_layout(pool) -> None:
    """gloo keeps a thread a group; a process that changes layouts must not gather them."""
    for counts in pool(2).run(threads_after_each_layout):
        assert counts[-1] <= counts[0], counts


def threads_after_each_run(student: str, teacher: str, rollouts: str, flags: list[str]) -> list[int]:
    counts = []
    for _ in range(3):
        cli.run(
            [
                *("train", "--student", student, "--teacher", teacher, "--rollout-engine", "file"),
                *("--rollout-data", rollouts, "--max-response-length", "16", "--train-iters", "1", "--lr", "0.1"),
                *("--global-batch-size", "4", "--micro-batch-size", "2", *flags),
            ]
        )
        distributed.initialize(ParallelConfig(), seed=1)  # leaves the layout of the run
        counts.append(len(list(TASKS.iterdir())))
    return counts


@pytest.mark.skipif(not TASKS.exists(), reason="counts threads in /proc")
@pytest.mark.parametrize(
    ("family", "flags"),
    [("qwen3", ["--use-distributed-optimizer"]), ("qwen3_moe", ["--optimizer", "sgd"])],
)
def test_no_thread_outlives_a_training_run(pool, tmp_path: Path, family: str, flags: list[str]) -> None:
    """DDP, gradient hooks and the distributed optimizer's shards hold each other where no garbage collector looks."""
    for seed, name in enumerate(("student", "teacher")):
        save_tiny_hf_model(tmp_path / name, family, num_layers=2, seed=seed)
    lines = [{"id": str(i), "prompt_tokens": [5, 6, 7 + i], "response_tokens": [9, 10 + i, 11]} for i in range(4)]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = [str(tmp_path / name) for name in ("student", "teacher", "rollouts.jsonl")]
    for counts in pool(2).run(threads_after_each_run, *paths, flags):
        assert counts[-1] <= counts[0], counts
