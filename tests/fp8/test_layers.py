"""Number formats of a teacher's layers through ``taopd score``: what they change shows, and changes little."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_taopd import cli
from megatron_taopd.fp8_config import DEFAULT_RECIPE
from megatron_taopd.fp8_support import find_fp8_support
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.oracle import reference
from tests.oracle.cases import make_rollouts

OBSTACLE = find_fp8_support().obstacle(DEFAULT_RECIPE)
SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn_size": 128}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of sides that FP8 can multiply."""
    root = tmp_path_factory.mktemp("layers")
    for seed, name in enumerate(("student", "teacher")):
        save_tiny_hf_model(root / name, "qwen3", **SIZES, seed=seed)
    make_rollouts(root / "rollouts.jsonl", seed=3)
    return root


@pytest.mark.parametrize(
    ("flags", "coarser", "most"),
    [
        ([], ["--teacher-dtype=bf16"], 0.1),
        pytest.param(
            ["--bf16"],
            ["--bf16", "--teacher-fp8-format=e4m3"],
            1.0,
            marks=(pytest.mark.gpu, pytest.mark.skipif(OBSTACLE is not None, reason=f"no FP8 layers: {OBSTACLE}")),
        ),
    ],
    ids=["bf16", "FP8"],
)
def test_a_coarser_teacher(root: Path, tmp_path: Path, flags: list[str], coarser: list[str], most: float) -> None:
    """The student's columns stay. A setting that megatron-core ignores in silence would leave all as it was."""
    tables = []
    for index, words in enumerate((flags, coarser)):
        models = [f"--student={root / 'student'}", f"--teacher={root / 'teacher'}", *words]
        out = tmp_path / f"{index}.jsonl"
        assert not cli.run(["score", *models, f"--rollout-data={root / 'rollouts.jsonl'}", f"--output={out}"])
        tables.append(reference.read_jsonl(out))

    def differences(name: str) -> list[float]:
        return [abs(a[name] - b[name]) for a, b in zip(*tables, strict=True)]

    assert max(differences("student_logprob")) < 1e-6
    for name in ("teacher_logprob", "teacher_entropy", "kl_forward"):
        found = differences(name)
        assert 1e-4 < sum(found) / len(found) < most, name
