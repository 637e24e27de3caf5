"""lm-evaluation-harness on a model whose answers are known."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from megatron_taopd import cli
from megatron_taopd.errors import ConfigError
from megatron_taopd.evaluation.config import HarnessConfig
from megatron_taopd.evaluation.harness import Harness
from tests.evaluation.certain import save_certain_model
from tests.needs import missing

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/eval"
TASK = {
    "task": "letters",
    "dataset_path": "json",
    "test_split": "train",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["<eos>"], "do_sample": False, "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "num_fewshot": 0,
}


@pytest.fixture
def harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        missing("no lm-eval", 'pip install -e ".[dev]" installs it')


@pytest.fixture(autouse=True)
def _environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import huggingface_hub.constants as constants

    with monkeypatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.setenv(name, os.environ.get(name, "0"))
        patch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
        yield


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def write_task(directory: Path, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "letters.yaml").write_text(yaml.safe_dump(TASK | changes))
    return directory / "letters.yaml"


@pytest.mark.usefixtures("harness")
def test_hugging_face_and_megatron_models(tmp_path: Path) -> None:
    model = save_certain_model(tmp_path / "certain")
    megatron = tmp_path / "megatron"
    assert cli.run(["convert", "hf-to-megatron", f"--source={model}", f"--output={megatron}"]) == 0
    lines = [{"question": f"q{i}", "answer": f"a{i if i < 2 else 7}"} for i in range(4)]
    data = write(tmp_path / "data.jsonl", lines)
    write_task(tmp_path / "tasks")
    (own := tmp_path / "own.jsonl").write_text('{"problem": "q5", "answer": "a5"}\n')
    raw = ["--prompt-style=raw", f"--harness-data=letters={data}"]
    by_name = ["--harness=letters", f"--harness-tasks-dir={tmp_path}/tasks", f"--task=exact:{own}"]
    for name, source, flags, problems in (
        ("by name", model, by_name, 4),
        ("megatron", megatron, [*by_name, "--harness-limit=3", "--max-response-length=3"], 3),
    ):
        out = tmp_path / name
        flags = [*flags, "--max-response-length=3"]
        assert cli.run(["eval", f"--model={source}", f"--output={out}", *raw, *flags]) == 0
        results = json.loads((out / "results.json").read_text())
        found = results["harness"]["letters"]
        assert found["exact_match"] == 2 / problems and found["problems"] == problems
        assert results["tasks"]["own"]["pass@1"] == 1.0 and results["model"] == str(source)
        samples = [json.loads(line) for line in (out / "harness_letters.jsonl").read_text().splitlines()]
        assert [sample["filtered_resps"] for sample in samples] == [[f"a{i}"] for i in range(problems)]
        assert [sample["exact_match"] for sample in samples] == [1.0, 1.0, 0.0, 0.0][:problems]
        assert not list(out.glob(".hf-*"))


@pytest.mark.usefixtures("harness")
def test_what_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"question": "q1", "answer": "a1"}])
    plain = str(write_task(tmp_path / "plain"))
    code = str(write_task(tmp_path / "code", unsafe_code=True))
    shots = str(write_task(tmp_path / "shots", num_fewshot=2))

    def refused(name: str, file: str | None = data, **settings: Any) -> str:
        pairs = [] if file is None else [f"{name}={file}"]
        with pytest.raises(ConfigError) as error:
            Harness(HarnessConfig(harness=[name], harness_data=pairs, **settings))
        return str(error.value)

    assert "runs the code that the model writes; allow it with --allow-code-execution" in refused(code)
    assert "shows 2 solved examples" in refused(shots)
    assert "there is no such file" in refused(plain, "nowhere.jsonl")
    missing = str(write_task(tmp_path / "missing", dataset_kwargs={"data_files": str(tmp_path / "none.jsonl")}))
    assert re.search(r"cannot be had.*none\.jsonl.*--harness-data", refused(missing, None))
    assert "is no directory" in refused(plain, harness_tasks_dir=str(tmp_path / "none"))
    for name, settings in ((code, {"allow_code_execution": True}), (shots, {"harness_num_fewshot": 0}), (plain, {})):
        assert len(Harness(HarnessConfig(harness=[name], harness_data=[f"{name}={data}"], **settings)).tasks) == 1


@pytest.mark.usefixtures("harness")
def test_humaneval_of_the_examples(tmp_path: Path) -> None:
    line = {"task_id": "x", "prompt": "def add(a, b):\n", "test": "def check(f):\n    assert f(1, 2) == 3\n"}
    data = write(tmp_path / "data.jsonl", [line | {"entry_point": "add"}])
    settings: dict[str, Any] = {
        "harness": ["humaneval_local"],
        "harness_tasks_dir": str(EXAMPLES / "harness"),
        "harness_data": [f"humaneval_local={data}"],
    }
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        Harness(HarnessConfig(**settings))
    (task,) = Harness(HarnessConfig(**settings, allow_code_execution=True)).tasks
    (problem,) = task.test_docs()
    assert task.doc_to_text(problem) == line["prompt"]
    assert task.process_results(problem, ["    return a + b\n"]) == {"pass@1": 1.0}
    assert task.process_results(problem, ["    return a - b\n"]) == {"pass@1": 0.0}


@pytest.fixture(scope="module")
def runner() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("humaneval_example", EXAMPLES / "harness/humaneval.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("humaneval_example", None)


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("def f(:", False),
        ("while True: pass", False),
        ("x = bytearray(3 * 2**30)", False),
    ],
)
def test_programs_and_their_limits(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch, program: str, passed: bool
) -> None:
    monkeypatch.setattr(runner, "SECONDS", 1 if "while" in program else 30)
    assert runner.passes(program) is passed


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"needs lm-eval, which is not installed: pip install -e '.\[eval\]'"):
        Harness(HarnessConfig(harness=["x"]))
