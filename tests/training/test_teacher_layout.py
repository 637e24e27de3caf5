"""A teacher at a layout of its own, offloaded, from a Megatron checkpoint, resumed: the numbers stay the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_taopd import cli
from megatron_taopd.errors import ConfigError
from megatron_taopd.models import load_hf_config
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig, TeacherLayout, TeacherParallelConfig
from megatron_taopd.training import pair, scopes
from tests.oracle.cases import make_pair, make_rollouts

FLAGS = (
    *("--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2", "--sequence-parallel"),
    *("--teacher-tensor-model-parallel-size=1", "--teacher-pipeline-model-parallel-size=2"),
)
TIMES = ("time_rollout", "time_score", "time_train", "time_step", "tokens_per_second")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teacher_layout")
    make_pair(root, "qwen3", tied_student=True, tied_teacher=False)
    make_rollouts(root / "rollouts.jsonl", count=40, seed=7)
    for name in ("student", "teacher"):
        words = [f"--source={root / name}", f"--output={root / name}-megatron", "--make-vocab-size-divisible-by=1"]
        cli.run(["convert", "hf-to-megatron", *words])
    return root


def train(root: Path, out: str, iters: int, *extra: str, teacher: str = "teacher", move: bool = False) -> None:
    """Runs in every rank; with ``move`` as on a machine whose device is called cpu."""
    original = pair.can_offload
    if move:
        pair.can_offload = scopes.can_offload = lambda flag: True
    try:
        cli.run(
            [
                *("train", f"--student={root / 'student'}", f"--teacher={root / teacher}"),
                *("--rollout-engine=file", f"--rollout-data={root / 'rollouts.jsonl'}", "--global-batch-size=20"),
                *(f"--train-iters={iters}", "--lr=1e-3", f"--log-dir={root / out}", *FLAGS, *extra),
            ]
        )
    finally:
        pair.can_offload = scopes.can_offload = original


def all_ways(root: Path) -> None:
    """Runs in every rank."""
    train(root, "plain", 2)
    # 20 micro-batches make three rounds of those whose rows wait in host memory
    train(root, "moved", 2, "--offload-teacher", "--offload-teacher-hidden", move=True)
    train(root, "checkpoint", 2, teacher="teacher-megatron")
    train(root, "bf16", 2, "--teacher-dtype=bf16")
    train(root, "resumed", 1, f"--save={root / 'checkpoints'}")
    train(root, "resumed", 2, f"--load={root / 'checkpoints'}")


def test_a_run_is_the_same_to_the_bit(pool, root: Path) -> None:
    pool(4).run(all_ways, root)

    def metrics(out: str) -> list[dict]:
        rows = [json.loads(line) for line in (root / out / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]

    plain = metrics("plain")
    assert [row["iteration"] for row in plain] == [1, 2]
    for how in ("moved", "checkpoint", "resumed"):
        assert metrics(how) == plain, how
    for a, b in zip(plain, metrics("bf16"), strict=True):
        assert b["kl_forward"] == pytest.approx(a["kl_forward"], rel=0.03) and b["kl_forward"] != a["kl_forward"]


def heads(root: Path, name: str) -> list[torch.Tensor | None]:
    """Runs in every rank: the head's shard from either kind of directory, and that of the whole model."""
    from megatron_taopd.models import load_head, load_model

    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    distributed.initialize(parallel, seed=1)
    try:
        settings = {"params_dtype": torch.float32, "padded_vocab_size": 768}
        model = load_model(root / name, parallel, trainable=False, **settings).module
        return [
            model.head_weight() if distributed.is_last_stage() else None,
            load_head(root / name, **settings),
            load_head(f"{root / name}-megatron", **settings),
        ]
    finally:
        distributed.shutdown()


@pytest.mark.parametrize("name", ["student", "teacher"])  # tied and untied
def test_head_alone(pool, root: Path, name: str) -> None:
    answers = pool(4).run(heads, root, name)
    assert [head is not None for head, *_ in answers] == [False, False, True, True]
    for whole, *alone in answers[2:]:
        for head in alone:
            assert torch.equal(head, whole) and head.shape[0] == 384
    for _, *alone in answers[:2]:
        assert alone == [None, None]


STUDENT = ParallelConfig(
    tensor_model_parallel_size=2,
    pipeline_model_parallel_size=2,
    decoder_last_pipeline_num_layers=1,
    sequence_parallel=True,
)


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({}, None),
        ({"tensor": 2, "pipeline": 2}, None),
        ({"tensor": 4}, {"tensor_model_parallel_size": 4}),
        (
            {"tensor": 1, "pipeline": 1},
            {
                "tensor_model_parallel_size": 1,
                "pipeline_model_parallel_size": 1,
                "decoder_last_pipeline_num_layers": None,
                "sequence_parallel": False,
            },
        ),
    ],
)
def test_what_is_not_given_is_the_students(given: dict[str, int], wanted: dict | None) -> None:
    flags = {f"teacher_{name}_model_parallel_size": size for name, size in given.items()}
    layout = TeacherParallelConfig(**flags).resolve(STUDENT)
    assert layout == (None if wanted is None else TeacherLayout(**{**vars(STUDENT), **wanted}))


def test_a_split_of_its_own() -> None:
    first = TeacherParallelConfig(teacher_decoder_first_pipeline_num_layers=3).resolve(STUDENT)
    assert first is not None  # at the same sizes
    assert (first.decoder_first_pipeline_num_layers, first.decoder_last_pipeline_num_layers) == (3, None)
    assert TeacherParallelConfig(teacher_decoder_last_pipeline_num_layers=1).resolve(STUDENT) is None
    counted = TeacherParallelConfig(
        teacher_pipeline_model_parallel_size=4,
        teacher_account_for_embedding_in_pipeline_split=True,
        teacher_account_for_loss_in_pipeline_split=True,
    ).resolve(STUDENT)
    assert counted is not None and counted.decoder_last_pipeline_num_layers is None
    assert counted.account_for_embedding_in_pipeline_split and counted.account_for_loss_in_pipeline_split
    for flags, message in (
        ({"decoder_first_pipeline_num_layers": 0}, "--teacher-decoder-first-pipeline-num-layers must be at least 1"),
        (
            {"pipeline_model_parallel_size": 1, "decoder_last_pipeline_num_layers": 2},
            "--teacher-decoder-last-.* has no effect with --teacher-pipeline-model-parallel-size 1",
        ),
        (
            {"decoder_last_pipeline_num_layers": 2, "account_for_embedding_in_pipeline_split": True},
            "--teacher-decoder-last-.* and --teacher-account-for-embedding-.* are two ways",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            TeacherParallelConfig(**{f"teacher_{name}": value for name, value in flags.items()}).resolve(STUDENT)


def test_a_teacher_that_does_not_divide_is_told_of_its_own_flags(root: Path) -> None:
    teacher = load_hf_config(root / "teacher")
    with pytest.raises(
        ConfigError, match="3 does not divide the 4 layers .*; or give the teacher .*--teacher-decoder-first"
    ):
        pair._lay_out_teachers(TeacherParallelConfig(), ParallelConfig(pipeline_model_parallel_size=3), [teacher])


def test_experts_of_the_teacher_follow_its_own_tensor_parallel_size() -> None:
    layout = TeacherParallelConfig(teacher_tensor_model_parallel_size=4).resolve(STUDENT)
    assert layout is not None and layout.expert_tensor_parallel_size is None
    assert layout.expert_parallel_size == 4 * 2  # x its stages
