"""Tasks from short forms, files and flags, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_taopd.cli import parse
from megatron_taopd.errors import ConfigError, DataError, TaopdError
from megatron_taopd.evaluation.config import EvalConfig
from megatron_taopd.evaluation.options import TaskOptions
from megatron_taopd.evaluation.prompts import encode_problems, opens_thinking
from megatron_taopd.evaluation.tasks import load_tasks
from tests.data.tokenizers_for_tests import SPECIAL, TEMPLATE, word_tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples/eval"
SUMS = "reasoning_gym:chain_sum"


def write(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_file_of_choices(tmp_path: Path) -> None:
    file = write(
        tmp_path / "colours.jsonl",
        {"problem": "sky?", "choices": ["red", "blue"], "answer": "B"},
        {"problem": "{choices} grass?", "choices": ["green", "blue"], "answer": 0},
        {"id": "blood", "problem": "blood?", "choices": ["green", "blue", "red"], "answer": "red"},
    )
    (task,) = load_tasks([f"choice:{file}"])
    assert task.name == "colours"
    assert [(p.id, p.gold) for p in task.problems] == [("0", "B"), ("1", "A"), ("blood", "C")]
    end = "\n\nPut the letter of the right choice in \\boxed{}."
    assert task.problems[0].prompt == "sky?\n\n(A) red\n(B) blue" + end
    # what stands in a problem is not filled in
    assert task.problems[1].prompt == "{choices} grass?\n\n(A) green\n(B) blue" + end


def test_shuffled_choices_in_fields_of_their_own(tmp_path: Path) -> None:
    lines = [{"q": f"q{i}", "good": f"g{i}", "bad 1": f"b{i}", "bad 2": f"c{i}"} for i in range(40)]
    file = write(tmp_path / "f.jsonl", *lines)
    options = TaskOptions(
        prompt_field="q",
        answer_field="good",
        choices_field=["good", "bad 1", "bad 2"],
        shuffle_choices=True,
        prompt_template="{problem}|{choices}",
    )
    first, again = (load_tasks([f"choice:{file}"], options)[0] for _ in range(2))
    assert first.problems == again.problems
    for i, problem in enumerate(first.problems):
        assert sorted(problem.choices) == sorted([f"g{i}", f"b{i}", f"c{i}"])
        assert f"({problem.gold}) g{i}" in (problem.prompt or "")
    assert {p.gold for p in first.problems} == {"A", "B", "C"}
    options.problem_seed = 1
    assert load_tasks([f"choice:{file}"], options)[0].problems != first.problems


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(
        "kind: reasoning_gym\ngenerator: chain_sum\ngenerator-settings: {max_terms: 3}\nsize: 4\nnum-samples: 3\n"
        "temperature: 0.5\nextract: whole\nproblem_seed: 7\n"
    )
    of_file, of_flags = (
        load_tasks([f"{name}{tmp_path}/t.yaml"], flags)[0]
        for name, flags in (("", TaskOptions()), ("x=", TaskOptions(size=2, temperature=1.0, problem_seed=0)))
    )
    assert (of_file.name, of_flags.name) == ("t", "x")
    assert of_file.settings.rollout.max_response_length == 1024
    for task, wanted in ((of_file, (4, 7, 0.5)), (of_flags, (2, 0, 1.0))):
        settings = task.settings
        assert (len(task.problems), settings.problem_seed, settings.rollout.temperature) == wanted
        assert settings.num_samples == 3 and settings.extract == ("whole",)
        assert settings.generator_settings == {"max_terms": 3}
        assert all(2 <= p.entry["metadata"]["num_terms"] <= 3 for p in task.problems)


def test_examples_load_with_data_of_their_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    math = [{"id": i, "unique_id": f"u{i}", "problem": "1 + 1?", "answer": "2"} for i in range(2)]
    for name in ("aime24", "aime25", "math500"):
        write(tmp_path / f"data/{name}.jsonl", *math)
    wrong = {f"Incorrect Answer {i}": f"w{i}" for i in (1, 2, 3)}
    line = {"Record ID": "r", "Question": "?", "Correct Answer": "right", **wrong}
    write(tmp_path / "data/gpqa_diamond.jsonl", line)
    config = parse(EvalConfig, ["--config", str(EXAMPLES / "paper.yaml"), "--model=m", "--output=o"], name="eval")
    tasks = load_tasks([str(EXAMPLES.parents[1] / spec) for spec in config.task])
    assert [task.name for task in tasks] == ["aime24", "aime25", "math500", "gpqa_diamond"]
    assert [problem.id for problem in tasks[2].problems] == ["u0", "u1"]
    assert dict(zip("ABCD", tasks[3].problems[0].choices, strict=True))[tasks[3].problems[0].gold] == "right"
    assert len(load_tasks([str(EXAMPLES / "chain_sum.yaml")])[0].problems) == 20
    for name in ("ifeval", "humaneval"):
        parse(EvalConfig, ["--config", str(EXAMPLES / f"{name}.yaml"), "--model=m", "--output=o"], name="eval")


@pytest.mark.parametrize(
    ("specs", "options", "message"),
    [
        (["chain_sum"], {}, "'chain_sum' is none of reasoning_gym:GENERATOR"),
        (["chain:sum"], {}, "is none of"),
        (["reasoning_gym:chain_sums"], {}, "no generator 'chain_sums'; did you mean chain_sum"),
        ([SUMS], {"generator_settings": '{"terms": 2}'}, "chain_sum refuses.*terms"),
        ([SUMS], {"generator_settings": '{"min_terms": 9}'}, "chain_sum refuses"),
        ([SUMS], {"generator_settings": '{"size": 9}'}, "size belongs to --size"),
        ([SUMS], {"generator_settings": "[1]"}, "must be a JSON object"),
        ([SUMS, SUMS], {}, "2 tasks are called 'chain_sum'"),
        ([SUMS], {"size": 0}, "--size 0 must be at least 1"),
        ([SUMS], {"prompt_field": "q"}, "--prompt-field q has no effect on tasks of kind reasoning_gym"),
        ([SUMS], {"shuffle_choices": True}, "--shuffle-choices True has no effect"),
        (["math:FILE"], {"problem_seed": 1}, "--problem-seed 1 has no effect on tasks of kind math"),
        ([SUMS], {"num_samples": 2}, "--num-samples 2 would be the same response"),
        ([SUMS], {"top_p": 0.5}, "--top-p 0.5 has no effect with --temperature 0"),
        ([SUMS], {"temperature": -1.0}, "--temperature -1.0 must not be negative"),
        ([SUMS], {"extract": ["boxes"]}, "unknown --extract rule 'boxes'; did you mean 'boxed'"),
        ([SUMS], {"prompt_template": "Go."}, "has no {problem}"),
        ([SUMS], {"prompt_template": "{problem}{choices}"}, "has {choices}"),
        (["choice:FILE"], {"prompt_template": "{problem}"}, "needs {choices}"),
        ([SUMS], {"prompt_style": "raw", "system_prompt": "Be good."}, "--system-prompt 'Be good.' has no effect"),
        (["math:nowhere.jsonl"], {}, "cannot read problems from nowhere.jsonl"),
        (["math:FILE"], {"size": 3}, "has 2 problems, fewer than --size 3"),
        (["math:FILE"], {"prompt_field": "question"}, ":1: no field 'question'; the line has id, problem"),
        (["math:FILE"], {"id_field": "name"}, ":1: no field 'name'.*--id-field"),
        (["math:FILE"], {"id_field": "same"}, ":2: the name 'a' is that of .*:1 too"),
        (["math:FILE"], {"answer_field": "choices"}, ":1: 'choices' must be text or a number, not list"),
        (["math:FILE"], {"prompt_field": "talk", "prompt_template": "{problem}"}, ":1: 'talk' is a conversation"),
        (["choice:FILE"], {}, ":1: 'answer' is 12, which is neither"),
        (["choice:FILE"], {"choices_field": ["same"]}, ":1: 'same' must be 2 to 26 choices"),
        (["no.yaml"], {}, "task file no.yaml cannot be read"),
    ],
)
def test_refusals(tmp_path: Path, specs: list[str], options: dict[str, Any], message: str) -> None:
    talk = [{"role": "user", "content": "hi"}]
    lines = [{"id": i, "problem": "?", "answer": 12, "same": "a", "choices": ["x", "y"], "talk": talk} for i in (1, 2)]
    file = write(tmp_path / "p.jsonl", *lines)
    with pytest.raises(TaopdError, match=message):
        load_tasks([spec.replace("FILE", file) for spec in specs], TaskOptions(**options))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must be a mapping"),
        ("kind: maths\ndata: x", "kind 'maths' is none of"),
        ("kind: math", "needs 'data'"),
        ("kind: math\ndata: x\ntemprature: 1", "unknown key 'temprature'"),
        ("kind: math\ndata: x\nsize: many", "size cannot be 'many'"),
        ("kind: math\ndata: x\nprompt-style: loud", "prompt_style cannot be 'loud'"),
        ("kind: math\ndata: x\nshuffle-choices: true", "shuffle_choices has no effect on a task of kind math"),
        ("kind: [", "not valid YAML"),
    ],
)
def test_task_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_tasks([str(tmp_path / "t.yaml")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task=" + SUMS], "give --model .* or --responses"),
        (["--task=" + SUMS, "--model=m", "--responses=r"], "give --model .* or --responses"),
        (["--model=m"], "nothing to evaluate on"),
        (["--responses=r"], "nothing to evaluate on"),
        (["--responses=r", "--task=" + SUMS, "--bf16"], "--bf16 True has no effect with --responses"),
        (["--responses=r", "--harness=x"], "--harness .* has no effect with --responses"),
        (["--model=m", "--task=" + SUMS, "--harness-limit=2"], "--harness-limit 2 has no effect without --harness"),
        (["--model=m", "--task=" + SUMS, "--allow-code-execution"], "--allow-code-execution True has no effect"),
        (["--model=m", "--harness=x", "--temperature=0.5"], "--temperature 0.5 has no effect without --task"),
        (["--model=m", "--harness=x", "--tensor-model-parallel-size=2"], "--harness runs in one process"),
        (["--model=m", "--harness=x", "--harness-data=y=z"], "'y' is not among --harness"),
        (["--model=m", "--harness=x", "--harness-data=z"], "must be TASK=FILE.jsonl"),
        (["--model=m", "--harness=x", "--harness-gen-kwargs=3"], "--harness-gen-kwargs '3' must be a JSON object"),
    ],
)
def test_flags_that_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(EvalConfig, ["--output=o", *flags], name="eval")
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and re.search(message, shown), shown


def test_prompts(tmp_path: Path) -> None:
    words = ["one", "two", "ask", "be", "good", "quiet", "<think>", "</think>"]
    tokenizer = word_tokenizer(words, chat_template=TEMPLATE)
    file = write(tmp_path / "p.jsonl", {"problem": "one two", "answer": "x"})
    talk = write(tmp_path / "t.jsonl", {"talk": [{"role": "user", "content": "two"}], "answer": "x"})

    def words_of(spec: str, **options: Any) -> str:
        (task,) = load_tasks([spec], TaskOptions(**options))
        (prompt,) = encode_problems(task, tokenizer, max_positions=2000, source="m")
        return tokenizer.decode(prompt.tokens, skip_special_tokens=False)

    assert words_of(f"exact:{file}") == "<user> one two <bot>"
    assert words_of(f"exact:{file}", system_prompt="be good") == "<user> be good <user> one two <bot>"
    quiet = '{"enable_thinking": false}'
    assert words_of(f"exact:{file}", chat_template_kwargs=quiet) == "<user> one two <bot> quiet"
    assert words_of(f"exact:{file}", prompt_style="raw", prompt_template="ask {problem}") == "ask one two"
    assert words_of(f"exact:{talk}", prompt_field="talk") == "<user> two <bot>"

    (task,) = load_tasks([f"exact:{file}"])
    with pytest.raises(DataError, match="has 4 tokens; with --max-response-length 1024 .* the 1027 positions of m"):
        encode_problems(task, tokenizer, max_positions=1027, source="m")
    with pytest.raises(ConfigError, match="tokenizer of m has no chat template; give --prompt-style raw"):
        encode_problems(task, word_tokenizer(words), max_positions=2000, source="m")

    for text, wanted in (("<think> one", True), ("<think> one </think>", False), ("one", False)):
        file = write(tmp_path / "p.jsonl", {"problem": text, "answer": "x"})
        (task,) = load_tasks([f"exact:{file}"], TaskOptions(prompt_style="raw"))
        (prompt,) = encode_problems(task, tokenizer, max_positions=2000, source="m")
        assert opens_thinking(prompt, tokenizer) == wanted
    assert len(SPECIAL) == 5  # the words above follow them
