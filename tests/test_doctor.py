"""The doctor says what is there and draws the right conclusions from it."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from megatron_taopd.doctor import (
    Gpu,
    Machine,
    fp8_head_verdict,
    fp8_verdict,
    inspect_machine,
    report,
    statistics_kernel_verdict,
    warnings,
    what_is_used,
)

CPU = Machine(python="3.11", versions={"megatron-core": "0.16.1", "transformer-engine": None}, apex=None)
HOPPER = Gpu(name="H100", capability=(9, 0), memory_bytes=80 * 2**30)
BLACKWELL = Gpu(name="B200", capability=(10, 0), memory_bytes=180 * 2**30)
AMPERE = Gpu(name="A100", capability=(8, 0), memory_bytes=80 * 2**30)
WITH_TE = {"megatron-core": "0.16.1", "transformer-engine": "2.9"}


def test_this_machine() -> None:
    text = report()
    assert f"torch                {torch.__version__}" in text
    assert f"megatron-core        {version('megatron-core')}" in text
    assert "gloo" in text
    if not torch.cuda.is_available():
        assert "fp8 layers: not possible, there is no CUDA device" in text


@pytest.mark.parametrize(
    ("gpus", "versions", "expected"),
    [
        ([], WITH_TE, "no CUDA device"),
        ([AMPERE], WITH_TE, "A100 has compute capability 8.0 and 8.9 is needed"),
        ([HOPPER, AMPERE], WITH_TE, "A100"),
        ([HOPPER], CPU.versions, "Transformer Engine is missing"),
        ([HOPPER], WITH_TE | {"transformer-engine": "2.1"}, "possible with delayed (Transformer Engine 2.1)"),
        (
            [HOPPER],
            WITH_TE,
            "possible with delayed, tensorwise, blockwise (Transformer Engine 2.9); not mxfp8: H100 has",
        ),
        ([BLACKWELL], WITH_TE, "possible with delayed, tensorwise, blockwise, mxfp8 (Transformer Engine 2.9)"),
    ],
)
def test_fp8(gpus: list[Gpu], versions: dict[str, str | None], expected: str) -> None:
    verdict = fp8_verdict(replace(CPU, gpus=gpus, versions=versions, cuda="13.0"))
    assert expected in verdict
    assert verdict.startswith("possible") == expected.startswith("possible")


def test_an_old_cuda_has_no_blocks() -> None:
    verdict = fp8_verdict(replace(CPU, gpus=[HOPPER], versions=WITH_TE, cuda="12.8"))
    assert "possible with delayed, tensorwise (" in verdict and "CUDA 12.8 and 12.9 is needed" in verdict


def test_the_fp8_head_needs_no_transformer_engine() -> None:
    assert fp8_head_verdict(replace(CPU, gpus=[HOPPER])) == "possible"
    assert "A100 has compute capability 8.0" in fp8_head_verdict(replace(CPU, gpus=[HOPPER, AMPERE]))
    assert "emulated" in fp8_head_verdict(CPU)


def test_layers_follow_transformer_engine_and_cuda() -> None:
    assert "layers: Transformer Engine" in what_is_used(replace(CPU, gpus=[HOPPER], versions=WITH_TE))
    for machine in (CPU, replace(CPU, gpus=[HOPPER]), replace(CPU, versions=WITH_TE)):
        assert any("local layers" in line for line in what_is_used(machine))


def test_an_engine_that_megatron_core_is_not_made_for() -> None:
    hopper = replace(CPU, gpus=[HOPPER], backends=["nccl"], engine_range="<2.12.0,>=2.9.0a0")
    for engine, fits in (("2.9", True), ("2.11.0+c188b53", True), ("2.12.1", False), ("2.8", False), (None, True)):
        told = warnings(replace(hopper, versions=WITH_TE | {"transformer-engine": engine}))
        assert [line for line in told if "is made for Transformer Engine <2.12" in line and str(engine) in line] == (
            [] if fits else told
        )
        assert bool(told) != fits
    assert not warnings(replace(hopper, engine_range="", versions=WITH_TE | {"transformer-engine": "9.9"}))
    if version("megatron-core") == "0.16.1":
        assert inspect_machine().engine_range == "<2.12.0,>=2.9.0a0"


def test_the_triton_kernel_needs_triton_and_a_gpu() -> None:
    with_triton = {**WITH_TE, "triton": "3.5.0"}
    assert "no CUDA device" in statistics_kernel_verdict(replace(CPU, versions=with_triton))
    assert "triton is missing" in statistics_kernel_verdict(replace(CPU, gpus=[HOPPER]))
    assert statistics_kernel_verdict(replace(CPU, gpus=[HOPPER], versions=with_triton)).startswith("possible")


def test_flash_attention_is_named_where_transformer_engine_runs_it() -> None:
    with_flash = {**WITH_TE, "flash-attn": "2.7.4"}
    lines = what_is_used(replace(CPU, gpus=[HOPPER], versions=with_flash))
    assert "attention: Transformer Engine, flash-attn 2.7.4 among its kernels" in lines
    assert not any("flash-attn" in line for line in what_is_used(replace(CPU, versions=with_flash)))


def test_an_empty_machine_is_no_error() -> None:
    text = report(Machine(python="3.10", versions={}, apex=None))
    assert "megatron-core is not installed" in text


@pytest.mark.parametrize("kind", ["unrelated", "nvidia"])
def test_apex_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").touch()
    if kind == "nvidia":
        (package / "optimizers.py").touch()
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    machine = inspect_machine()
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert machine.apex == kind
    assert ("pip uninstall apex" in report(machine)) == (kind == "unrelated")
