"""Recorded responses through the command: hand-made ones have the numbers that one counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_taopd import cli
from megatron_taopd.errors import ConfigError, DataError
from megatron_taopd.evaluation.options import TaskOptions
from megatron_taopd.evaluation.tasks import load_tasks


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def problems(tmp_path: Path) -> str:
    return write(tmp_path / "three.jsonl", [{"id": i, "problem": f"{i} + 1 =", "answer": i + 1} for i in (1, 2, 3)])


def judge(tmp_path: Path, *flags: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    out = tmp_path / "out"
    assert cli.run(["eval", f"--output={out}", *flags]) == 0
    lines = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    return json.loads((out / "results.json").read_text()), lines


def test_numbers_by_hand(tmp_path: Path, problems: str, capsys: pytest.CaptureFixture[str]) -> None:
    # Right of four: 4, 1 and 0. So pass@1 = 5/12; pass@2 = (1 + 1/2 + 0)/3; pass@4 = 2/3.
    said = {"1": ["2", "\\boxed{2}", "is 2.", "2.0"], "2": ["2", "<think> 3", "3", ""], "3": ["5", "a", "b", "c"]}
    lines = [
        {"problem": problem, "response": text, "response_tokens": [1] * (index + 1), "finish_reason": reason}
        for problem, texts in said.items()
        for index, (text, reason) in enumerate(zip(texts, ("stop", "stop", "stop", "length"), strict=True))
    ]
    responses = write(tmp_path / "r.jsonl", lines)
    results, judged = judge(tmp_path, f"--responses={responses}", f"--task=math:{problems}")
    found = results["tasks"]["three"]
    assert (found["problems"], found["distinct_problems"], found["samples"]) == (3, 3, 4)
    assert found["pass@1"] == found["mean@n"] == found["mean_score"] == pytest.approx(5 / 12)
    values = {k: entry["value"] for k, entry in found["pass@k"].items()}
    assert values == pytest.approx({"1": 5 / 12, "2": 1 / 2, "4": 2 / 3})
    assert 0 <= found["interval"][0] < 5 / 12 < found["interval"][1] <= 1
    assert found["mean_response_length"] == 2.5 and found["stop_share"] == 0.75
    assert found["answered_share"] == 10 / 12 and found["judge_errors"] == 0
    assert [line["correct"] for line in judged] == [True] * 4 + [False, False, True, False] + [False] * 4
    assert [line["rule"] for line in judged[:2]] == ["last_line", "boxed"]
    assert judged[5]["answer"] is None and judged[6]["gold"] == "3" and judged[6]["sample"] == 2
    printed = capsys.readouterr().out
    assert "0.417" in printed and "three" in printed and str(tmp_path / "out") in printed

    # What was written is judged again, with other rules, by the same command.
    with pytest.raises(ConfigError, match="has a results.json already"):
        judge(tmp_path, f"--responses={responses}", f"--task=math:{problems}")
    again, _ = judge(
        tmp_path,
        f"--responses={tmp_path}/out/responses.jsonl",
        f"--task=math:{problems}",
        "--extract=boxed",
        "--overwrite",
    )
    assert again["tasks"]["three"]["pass@1"] == pytest.approx(1 / 12)


def test_what_is_right_by_construction_scores_one(tmp_path: Path, problems: str) -> None:
    options = TaskOptions(size=4)
    lines: list[dict[str, Any]] = []
    specs = ["reasoning_gym:countdown", "reasoning_gym:chain_sum", "reasoning_gym:spell_backward"]
    for task in load_tasks(specs, options):
        for problem in task.problems:
            answer = problem.entry["metadata"].get("expression") if task.name == "countdown" else problem.gold
            lines.append({"task": task.name, "problem": problem.id, "response": f"<answer>{answer}</answer>"})
    responses = write(tmp_path / "r.jsonl", lines)
    results, _ = judge(tmp_path, f"--responses={responses}", "--size=4", *(f"--task={spec}" for spec in specs))
    for found in results["tasks"].values():
        assert found["pass@1"] == found["mean_score"] == 1.0 and found["interval"] == [1.0, 1.0]
        assert found["mean_response_length"] is None and found["stop_share"] is None
    assert list(results["tasks"]) == ["countdown", "chain_sum", "spell_backward"]


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        ([{"problem": "1", "response": "2"}], [], "problem '2' of task three has 0 responses and another has 1"),
        ([{"problem": "9", "response": "2"}], [], ":1: task three has no problem '9' among its 3"),
        ([{"problem": "1"}], [], ":1: 'response' is missing"),
        ([{"problem": "1", "response": 2}], [], ":1: 'response' must be a string"),
        ([{"problem": "1", "response": "2", "task": "x"}], [], "three has 0 responses|belongs to task 'x'"),
        ([{"problem": "1", "response": "2"}], ["--task=reasoning_gym:chain_sum"], ":1: 'task' is missing"),
        ([{"problem": "1", "response": "2"}], ["--temperature=1"], "--temperature 1.0 has no effect on --responses"),
        ([{"problem": "1", "response": "2"}], ["--prompt-template={problem}"], "--prompt-template .* has no effect"),
    ],
)
def test_refusals(tmp_path: Path, problems: str, lines: list[Any], flags: list[str], message: str) -> None:
    responses = write(tmp_path / "r.jsonl", lines)
    with pytest.raises((DataError, ConfigError), match=message):
        cli.run(["eval", f"--output={tmp_path}/o", f"--responses={responses}", f"--task=math:{problems}", *flags])
    assert not (tmp_path / "o/results.json").exists()


def test_unequal_numbers_of_responses(tmp_path: Path, problems: str) -> None:
    lines = [{"problem": p, "response": "2", "finish_reason": "stop"} for p in ("1", "2", "3", "3")]
    with pytest.raises(DataError, match="problem '1' of task three has 1 responses and another has 2"):
        judge(tmp_path, f"--responses={write(tmp_path / 'r.jsonl', lines)}", f"--task=math:{problems}")


def test_in_one_process_only(tmp_path: Path, problems: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--responses works in one process and 2 were started"):
        judge(tmp_path, "--responses=r", f"--task=math:{problems}")
    with pytest.raises(ConfigError, match="--harness works in one process and 2 were started"):
        judge(tmp_path, "--model=m", "--harness=x")
