"""The Triton kernel of the statistics: right in the interpreter, compiled for GPUs, refused where it cannot run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_taopd import cli
from megatron_taopd.config import ScoreConfig
from megatron_taopd.errors import ConfigError
from megatron_taopd.ops.candidates import ABSENT_ID
from megatron_taopd.ops.tiles import FAR_BELOW
from megatron_taopd.ops.triton_statistics import MAX_SUPPORT_K, check_statistics_kernel
from megatron_taopd.run_config import ModelPairConfig, ScoringConfig
from tests.naive import make_problem
from tests.needs import needs_module
from tests.oracle.cases import make_pair, make_rollouts
from tests.teachability.test_statistics import compute

INTERPRETED = Path(__file__).with_name("triton_interpreted.py")


@pytest.fixture()
def _triton() -> None:
    needs_module("triton")


@pytest.mark.usefixtures("_triton")
def test_in_the_interpreter() -> None:
    """Everything in ``triton_interpreted.py``."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize(("capability", "logits"), [(80, "fp32"), (90, "fp32"), (90, "bf16"), (100, "fp32")])
def test_compiles_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: int, logits: str) -> None:
    """Ahead of time, without a GPU: that the compiler makes machine code of it, not that it is right."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_taopd.ops.triton_kernels import tile_statistics_kernel

    constants = {
        "far_below": FAR_BELOW, "absent_id": ABSENT_ID, "K": 16, "SLOTS": 16, "ROWS": 1, "COLUMNS": 4096
    }  # fmt: skip
    pointers = {"student": logits, "teacher": logits, "sums": "fp32", "values": "fp32", "ids": "i64", "others": "fp32"}
    signature = {
        **{f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()},
        **dict.fromkeys(("num_rows", "width", "stride", "first_id"), "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    compiled = triton.compile(
        ASTSource(tile_statistics_kernel, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 8},
    )
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    # What a program needs of shared memory must be there on the smallest of these GPUs.
    assert compiled.metadata.shared <= 96 * 1024


def test_refused_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest)
    )
    with pytest.raises(ConfigError, match="--statistics-kernel triton needs the package triton.*pip install triton"):
        check_statistics_kernel("triton", k=16, device_type="cuda")
    check_statistics_kernel("torch", k=16, device_type="cuda")


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"k": 16, "device_type": "cpu"}, "needs a CUDA device and the models are on 'cpu'"),
        ({"k": MAX_SUPPORT_K + 1, "device_type": "cuda"}, f"at most {MAX_SUPPORT_K} ids a row and --support-k is 129"),
        ({"k": 16, "device_type": "cuda", "dtype": torch.float64}, "in fp32 and the weights are float64"),
    ],
)
def test_refused(asked: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_statistics_kernel("triton", **asked)


@pytest.mark.usefixtures("_triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
def test_statistics_on_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match="--statistics-kernel triton needs a CUDA device"):
        compute(make_problem(2, 37, padded=48).to(torch.float32), k=4, kernel="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a CUDA device")
@pytest.mark.parametrize("name", ["score", "train"])
def test_commands_refuse_before_they_load_a_model(tmp_path: Path, name: str) -> None:
    make_pair(tmp_path, "qwen3")
    make_rollouts(tmp_path / "rollouts.jsonl")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    words = [name, f"--student={tmp_path / 'student'}", f"--teacher={tmp_path / 'teacher'}"]
    words += [f"--rollout-data={tmp_path / 'rollouts.jsonl'}", "--statistics-kernel=triton"]
    words += [f"--output={tmp_path / 'out.jsonl'}"] if name == "score" else ["--rollout-engine=file", "--train-iters=1"]
    with pytest.raises(ConfigError, match="--statistics-kernel triton needs"):
        cli.run(words)


def test_two_replacements_of_the_same_passes_are_refused() -> None:
    with pytest.raises(ConfigError, match="--compile-statistics has no effect with --statistics-kernel triton"):
        ScoringConfig(compile_statistics=True, statistics_kernel="triton")
    with pytest.raises(ConfigError, match="--compile-statistics has no effect with --statistics-kernel triton"):
        ScoreConfig(
            models=ModelPairConfig(student="s", teacher=["t"]),
            rollout_data="r.jsonl",
            output="o.jsonl",
            compile_statistics=True,
            statistics_kernel="triton",
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ties", [False, True])
def test_on_a_gpu(ties: bool) -> None:
    """The same as the torch passes on the same device, with one tile and with many."""
    problem = make_problem(33, 5003, padded=5056, ties=ties).to(torch.float32).on("cuda")
    for chunk_rows in (3, 33):
        got = compute(problem, chunk_rows, k=16, kernel="triton")
        for name, value in compute(problem, chunk_rows, k=16).items():
            torch.testing.assert_close(
                got[name], value, rtol=2e-5, atol=2e-5, msg=lambda text, at=name: f"{at}: {text}"
            )
