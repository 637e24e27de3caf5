"""The quickstart's models and prompts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.needs import needs_module

SCRIPT = Path(__file__).resolve().parents[2] / "examples/quickstart/prepare.py"


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_prepare", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_student_is_the_teacher_without_the_dropped_layers(prepare: ModuleType, tmp_path: Path) -> None:
    teacher = save_tiny_hf_model(tmp_path / "teacher", "llama", num_layers=4, tied=True)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    prepare.drop_layers(model, [1, 2])
    tokens = torch.arange(3, 11)[None]
    with torch.no_grad():
        expected = model(tokens).logits
    model.save_pretrained(tmp_path / "student")

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert student.config.num_hidden_layers == 2
    with torch.no_grad():
        torch.testing.assert_close(student(tokens).logits, expected)
    old, new = (load_file(path / "model.safetensors") for path in (teacher, tmp_path / "student"))
    for name, weight in new.items():
        source = name.replace("layers.1.", "layers.3.")
        assert torch.equal(weight, old[source]), name


@pytest.mark.parametrize("dropped", [[4], [0, 1, 2, 3]])
def test_layers_that_cannot_be_dropped(prepare: ModuleType, tmp_path: Path, dropped: list[int]) -> None:
    teacher = save_tiny_hf_model(tmp_path / "teacher", "llama", num_layers=4)
    with pytest.raises(SystemExit, match="not all, of 0 to 3"):
        prepare.drop_layers(AutoModelForCausalLM.from_pretrained(teacher), dropped)


def test_what_is_there_is_used_again_and_a_torn_one_is_not(prepare: ModuleType, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.mkdir()
        raise RuntimeError("the disk is full")

    target = tmp_path / "teacher"
    with pytest.raises(RuntimeError):
        prepare.make(target, "a model", fail)
    assert not target.exists()
    prepare.make(target, "a model", Path.mkdir)
    prepare.make(target, "a model", fail)


def test_prompts_differ_and_come_out_the_same_twice(prepare: ModuleType, tmp_path: Path) -> None:
    needs_module("reasoning_gym")
    texts = []
    for name, num_train in (("a", 20), ("b", 30)):
        (tmp_path / name).mkdir()
        prepare.write_prompts(tmp_path / name, num_train, 5, seed=3)
        texts.append([(tmp_path / name / f"{part}_prompts.jsonl").read_text() for part in ("heldout", "train")])
    assert texts[0][0] == texts[1][0] and texts[1][1].startswith(texts[0][1])
    lines = [json.loads(line) for text in texts[1] for line in text.splitlines()]
    assert len({line["messages"][0]["content"] for line in lines}) == len(lines) == 35
