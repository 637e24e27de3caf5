"""Bad input is refused before any work, by an error that names the thing, shows the values and says what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_taopd import cli
from megatron_taopd.errors import TaopdError
from tests.oracle.cases import make_pair, make_rollouts


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    make_pair(root, "qwen3")
    make_rollouts(root / "rollouts.jsonl")
    return root


@pytest.fixture()
def case(good: Path, tmp_path: Path) -> Path:
    """A private copy of a pair that works, for a test to spoil."""
    shutil.copytree(good, tmp_path / "case")
    return tmp_path / "case"


def save_tokenizer(directory: Path, words: list[str]) -> None:
    vocab = {"<pad>": 0, "<unk>": 1, "<eos>": 2, **{word: i + 3 for i, word in enumerate(words)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(directory)


def command(root: Path, *extra: str, name: str = "train") -> list[str]:
    words = [name, f"--student={root / 'student'}"]
    if not any(word.startswith("--teacher=") for word in extra):
        words.append(f"--teacher={root / 'teacher'}")
    words.append(f"--rollout-data={root / 'rollouts.jsonl'}")
    if name == "train":
        words += ["--rollout-engine=file", "--train-iters=1", f"--export-hf={root / 'out'}"]
    else:
        words.append(f"--output={root / 'out' / 'scores.jsonl'}")
    return [*words, *extra]


def refused(words: list[str]) -> str:
    """Runs in a rank: the message of the refusal."""
    try:
        cli.run(words)
    except TaopdError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def tokenizers_disagree(root: Path) -> tuple[str, ...]:
    save_tokenizer(root / "student", ["alpha", "beta", "gamma"])
    save_tokenizer(root / "teacher", ["alpha", "gamma", "beta"])
    return ()


def stop_tokens_differ(root: Path) -> tuple[str, ...]:
    for directory, stop in (("student", 2), ("teacher", 7)):
        save_tokenizer(root / directory, ["alpha", "beta", "gamma", "delta", "epsilon"])
        for file in ("generation_config.json", "config.json"):
            path = root / directory / file
            path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": stop}))
    return ()


def teacher_shard_missing(root: Path) -> tuple[str, ...]:
    path = root / "teacher" / "model.safetensors"
    names = list(load_file(path))
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors")
    weight_map[names[-1]] = "model-00002-of-00002.safetensors"
    path.rename(root / "teacher" / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (root / "teacher" / "model.safetensors.index.json").write_text(json.dumps(index))
    return ()


def teacher_all_zero(root: Path) -> tuple[str, ...]:
    path = root / "teacher" / "model.safetensors"
    save_file({n: torch.zeros_like(t) for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    return ()


def malformed_line(root: Path) -> tuple[str, ...]:
    path = root / "rollouts.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]) + "\n")
    return ()


def two_teachers(root: Path) -> tuple[str, ...]:
    """Responses for both of them."""
    lines = [json.loads(line) for line in (root / "rollouts.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        line["teacher"] = ("math", "code")[index % 2]
    (root / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"--teacher=math={root / 'teacher'}", f"--teacher=code={root / 'teacher'}"


def two_teachers_of_one_name(root: Path) -> tuple[str, ...]:
    return tuple(word.replace("=code=", "=math=") for word in two_teachers(root))


def unknown_teacher(root: Path) -> tuple[str, ...]:
    words = two_teachers(root)
    path = root / "rollouts.jsonl"
    path.write_text(path.read_text().replace('"code"', '"codes"'))
    return words


def no_teacher(root: Path) -> tuple[str, ...]:
    words = two_teachers(root)
    path = root / "rollouts.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace('"teacher"', '"taught_by"')
    path.write_text("\n".join(lines) + "\n")
    return words


def empty_prompts(root: Path) -> tuple[str, ...]:
    save_tokenizer(root / "student", ["alpha"])
    save_tokenizer(root / "teacher", ["alpha"])
    (root / "prompts.jsonl").write_text("\n")
    return ()


def nothing(root: Path) -> tuple[str, ...]:
    return ()


def flags(*words: str) -> Callable[[Path], tuple[str, ...]]:
    return lambda root: words


# name -> (spoil, ranks, words the message must have)
CASES: dict[str, tuple[Callable[[Path], tuple[str, ...]], int, tuple[str, ...]]] = {
    "tokenizers disagree": (tokenizers_disagree, 1, ("token", "beta", "gamma")),
    "stop tokens differ": (stop_tokens_differ, 1, ("2", "7", "--allow-stop-token-mismatch")),
    "teacher shard missing": (teacher_shard_missing, 1, ("model-00002-of-00002.safetensors", "teacher")),
    "teacher all zero": (teacher_all_zero, 1, ("zero", "teacher")),
    "heads do not divide": (flags("--tensor-model-parallel-size=3"), 3, ("3", "heads", "4")),
    "teacher's heads do not divide": (
        flags("--teacher-tensor-model-parallel-size=3", "--global-batch-size=9"),
        3,
        ("--teacher-tensor-model-parallel-size 3", "8", "heads", "teacher"),
    ),
    "teacher's layers do not divide": (
        flags("--teacher-pipeline-model-parallel-size=3", "--global-batch-size=9"),
        3,
        ("--teacher-pipeline-model-parallel-size 3", "4 layers", "teacher"),
    ),
    "ranks do not hold a teacher": (
        flags("--teacher-tensor-model-parallel-size=4"),
        2,
        ("2 ranks", "--teacher-tensor-model-parallel-size 4", "--teacher-pipeline-model-parallel-size 1"),
    ),
    "teacher has no experts": (
        flags("--teacher-expert-model-parallel-size=2"),
        2,
        ("--teacher-expert-model-parallel-size 2", "no experts"),
    ),
    "teacher on no ranks": (
        flags("--teacher-pipeline-model-parallel-size=0"),
        0,
        ("--teacher-pipeline-model-parallel-size", "at least 1", "0"),
    ),
    "a teacher without a name": (flags("--teacher=math=here", "--teacher=there"), 0, ("there", "NAME=")),
    "teachers of one name": (two_teachers_of_one_name, 0, ("math", "2 times")),
    "unknown teacher": (unknown_teacher, 1, ("rollouts.jsonl:2", "codes", "math, code")),
    "response without a teacher": (no_teacher, 1, ("rollouts.jsonl:3", "'teacher'", "math, code")),
    "malformed line": (malformed_line, 1, ("rollouts.jsonl:2",)),
    "response too long": (flags("--max-response-length=3"), 1, ("r", "3", "max-response-length")),
    "batch does not divide": (flags("--global-batch-size=7", "--micro-batch-size=2"), 1, ("7", "2")),
    "K above the vocabulary": (flags("--support-k=600"), 1, ("600", "509")),
    "fp8 without Transformer Engine": (flags("--fp8-format=e4m3"), 1, ("Transformer Engine",)),
    "virtual stages without stages": (
        flags("--num-virtual-stages-per-pipeline-rank=2"),
        0,
        ("--num-virtual-stages-per-pipeline-rank 2", "--pipeline-model-parallel-size 1", "no effect"),
    ),
    "virtual stages do not divide the layers": (
        flags("--pipeline-model-parallel-size=2", "--num-virtual-stages-per-pipeline-rank=2"),
        2,
        ("--num-virtual-stages-per-pipeline-rank 2", "a stage 1 of the 2 layers", "student"),
    ),
    "virtual stages of unequal size": (
        flags(
            "--pipeline-model-parallel-size=2",
            "--num-virtual-stages-per-pipeline-rank=2",
            "--decoder-first-pipeline-num-layers=1",
        ),
        2,
        ("a stage 1 of the 2 layers", "--num-virtual-stages-per-pipeline-rank 2"),
    ),
    "too few micro-batches for virtual stages": (
        flags("--pipeline-model-parallel-size=2", "--num-virtual-stages-per-pipeline-rank=2", "--global-batch-size=3"),
        2,
        ("--num-virtual-stages-per-pipeline-rank 2", "--global-batch-size 3", "multiple of 2"),
    ),
    "context ranks do not divide": (flags("--context-parallel-size=3"), 2, ("--context-parallel-size 3", "2 ranks")),
    "packed length without packing": (
        flags("--max-packed-length=64"),
        0,
        ("--max-packed-length 64", "--packed-sequences"),
    ),
    "two sizes of a packed micro-batch": (
        flags("--packed-sequences", "--max-packed-length=64", "--micro-batch-size=2"),
        0,
        ("--micro-batch-size 2", "--max-packed-length 64"),
    ),
    "response too long to be packed": (
        flags("--packed-sequences", "--max-packed-length=5"),
        1,
        ("--max-packed-length 5", "'r", "tokens"),
    ),
    "recorded responses for a server": (flags("--rollout-engine=openai"), 0, ("--rollout-data", "openai")),
    "greedy without a distillation temperature": (
        flags("--temperature=0"),
        0,
        ("--distillation-temperature",),
    ),
    "missing model": (flags("--teacher=/nowhere/teacher"), 1, ("/nowhere/teacher",)),
    "nothing to resume": (flags("--load=/nowhere/checkpoints"), 1, ("/nowhere/checkpoints",)),
    "optimizer cannot be sharded": (flags("--optimizer=sgd", "--use-distributed-optimizer"), 0, ("sgd",)),
    "option without effect": (flags("--selector=full", "--keep-ratio=0.1"), 0, ("full", "keep-ratio")),
    "keep ratio 0": (flags("--keep-ratio=0"), 0, ("keep-ratio", "0")),
    "keep ratio above 1": (flags("--keep-ratio=1.5"), 0, ("keep-ratio", "1.5")),
    "unknown selector": (flags("--selector=teachabilty"), 0, ("teachabilty", "teachability_entropy")),
    "unknown scope": (flags("--selection-scope=micro_batch"), 0, ("micro_batch", "global", "carried")),
    "decay without a carried scope": (flags("--carried-decay=0.5"), 0, ("--carried-decay 0.5", "global", "carried")),
    "agreement without a carried scope": (
        flags("--carried-agreement-interval=2"),
        0,
        ("--carried-agreement-interval 2", "global", "carried"),
    ),
    "decay that learns nothing": (
        flags("--selection-scope=carried", "--carried-decay=1"),
        0,
        ("--carried-decay 1", "[0, 1)"),
    ),
    "agreement never and always": (
        flags("--selection-scope=carried", "--carried-agreement-interval=0"),
        0,
        ("--carried-agreement-interval 0", "at least 1"),
    ),
    "nothing to carry": (
        flags("--selection-scope=carried", "--selector=random", "--carried-decay=0.5"),
        0,
        ("--carried-decay 0.5", "random", "no effect"),
    ),
    "recorded responses have no hidden states": (
        flags("--score-from=rollout"),
        0,
        ("--score-from rollout", "file", "--rollout-engine megatron"),
    ),
    "unknown teacher type": (flags("--teacher-dtype=fp16"), 0, ("fp16", "bf16", "fp32")),
    "unknown flag": (flags("--keep-ration=0.1"), 0, ("--keep-ration", "--keep-ratio")),
}


def parse_failure(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the user sees of a mistake that parsing finds."""
    try:
        status = cli.main(words)
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    return re.sub(r"[│\s]+", " ", capsys.readouterr().err)


@pytest.mark.parametrize("name", CASES)
def test_refused_with_reason_and_remedy(pool, case: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    spoil, ranks, wanted = CASES[name]
    words = command(case, *spoil(case))
    if ranks:
        messages = pool(ranks).run(refused, words)
    else:
        messages = [parse_failure(words, capsys)]
    for message in messages:
        for word in wanted:
            assert word in message, f"{word!r} is not in: {message}"
    assert not (case / "out").exists()


def test_empty_prompt_file(pool, case: Path) -> None:
    empty_prompts(case)
    words = command(case)
    words = [w for w in words if not w.startswith("--rollout")] + [f"--prompt-data={case / 'prompts.jsonl'}"]
    (message,) = pool(1).run(refused, words)
    assert "prompts.jsonl" in message and "empty" in message


def test_stop_token_mismatch_can_be_allowed(pool, case: Path) -> None:
    stop_tokens_differ(case)
    pool(1).run(cli.run, command(case, "--allow-stop-token-mismatch"))
    assert (case / "out" / "config.json").exists()


@pytest.mark.parametrize("name", ["train", "score"])
def test_yaml_key_with_suggestion(case: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (case / "run.yaml").write_text("keep_ration: 0.1\n")
    message = parse_failure(command(case, f"--config={case / 'run.yaml'}", name=name), capsys)
    assert "keep_ration" in message and "keep_ratio" in message and "run.yaml" in message


def test_no_scoring_pass_to_score_from_rollout_for(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [w for w in command(case) if not w.startswith("--rollout")] + [f"--prompt-data={case / 'prompts.jsonl'}"]
    message = parse_failure([*words, "--score-from=rollout", "--selection-scope=carried"], capsys)
    assert "--score-from rollout" in message and "--selection-scope carried" in message and "no effect" in message


SCORE_CASES = {
    "--selection-scope=carried": ("--selection-scope carried", "taopd score", "use global"),
    "--score-from=rollout": ("--score-from",),
    "--offload-teacher": ("--offload-teacher",),
    "--offload-teacher-hidden": ("--offload-teacher-hidden",),
}


@pytest.mark.parametrize("flag", SCORE_CASES)
def test_scoring_one_batch_refuses_what_needs_steps(case: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    message = parse_failure(command(case, flag, name="score"), capsys)
    for word in SCORE_CASES[flag]:
        assert word in message, f"{word!r} is not in: {message}"
    assert not (case / "out").exists()


def test_unknown_sub_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean score" in parse_failure(["scor"], capsys)
