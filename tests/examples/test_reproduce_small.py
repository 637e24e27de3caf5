"""The small reproduction in a short form: its task, its models, its control, and one suite with all of it."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from megatron_taopd import cli

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "examples/reproduce_small"
TERMS = 4
REGIME = "far"


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The example's modules, which import each other by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        before = set(sys.modules)
        import control
        import prepare
        import results
        import sft
        import task

        yield SimpleNamespace(control=control, prepare=prepare, results=results, sft=sft, task=task)
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and str(SCRIPTS) in str(sys.modules[name].__file__):
                del sys.modules[name]


@dataclass
class Made:
    """What the whole reproduction left behind."""

    home: Path
    suite: Path
    out: Path


@pytest.fixture(scope="module")
def made(scripts: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Everything of one regime, made by the scripts at tiny sizes."""
    pytest.importorskip("reasoning_gym")
    home = tmp_path_factory.mktemp("reproduce")
    sizes = scripts.prepare.Sizes(
        num_terms=TERMS,
        batch_size=4,
        teacher_size=16,
        teacher_steps=6,
        student_size=16,
        base_steps=2,
        student_steps=2,
        num_train=8,
        num_validation=4,
        num_heldout=4,
        contexts_per_student=2,
    )
    scripts.prepare.prepare(home, sizes, [1, 2], [REGIME])
    suite = _short_suite(home, scripts.task.response_length(TERMS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.control, "Sizes", lambda: sizes)
        patch.setattr(sys, "argv", ["control.py", str(suite)])
        scripts.control.main()
    out = home / REGIME / "suite"
    assert cli.run(["suite", "run", f"--suite={suite}", f"--out={out}"]) == 0
    return Made(home, suite, out)


def _short_suite(home: Path, response_length: int) -> Path:
    """The committed suite file, with other paths and less of everything."""
    text = (SCRIPTS / f"{REGIME}.yaml").read_text().replace("build/reproduce_small", str(home))
    content = yaml.safe_load(text)
    content["settings"] |= {"train-iters": 2, "lr-warmup-iters": 1}
    content["settings"] |= {"global-batch-size": 4, "micro-batch-size": 4}
    content["settings"]["max-response-length"] = response_length
    content["methods"] = {name: content["methods"][name] for name in ("start", "control", "full", "teachability-raw")}
    content |= {"budgets": [0.1], "seeds": [1], "lr": [1e-3, 1e-2], "sweep": {"seeds": [1], "by": "kl_forward"}}
    for part in ("validation", "held_out"):
        name = Path(content[part]["tasks"][0])
        task = yaml.safe_load((ROOT / name).read_text().replace("build/reproduce_small", str(home)))
        (home / name.name).write_text(yaml.safe_dump(task | {"max_response_length": response_length}))
        content[part]["tasks"] = [str(home / name.name)]
    path = home / f"{REGIME}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_workings_are_right(scripts: Any) -> None:
    pytest.importorskip("reasoning_gym")
    task = scripts.task
    for problem in islice(task.problems(9, 20), 20):
        *terms, start = problem.prompt.split(" ; ")
        numbers = [start.removeprefix("from "), *(term.removeprefix("then ") for term in terms)]  # as 46 +17 -65
        assert int(problem.answer) == eval("".join(numbers)) % 100
        words, kinds = task.working(problem)
        assert [" ".join(words[i : i + 2]) for i in range(0, 60, 3)] == terms
        for i in range(20):  # each total is the sum so far
            assert int(words[3 * i + 2]) == eval("".join(numbers[: 2 + i])) % 100
            assert kinds[3 * i : 3 * i + 3] == ["then", "term", words[3 * i + 1][0]]
        assert len(words) == task.response_length(20) == len(kinds)
        assert task.score(" ".join(words[:-1]), problem.answer) == 1.0
        assert task.score(" ".join([*words[:-2], str((int(problem.answer) + 1) % 100)]), problem.answer) == 0.0
        assert task.score(" ".join(words[:-2]), problem.answer) == 0.0, "the last total is missing"
        assert task.score("", problem.answer) == 0.0


def test_streams_have_no_problem_in_common(scripts: Any) -> None:
    first, again, other = ([p.prompt for p in islice(scripts.task.problems(stream, 34), 300)] for stream in (2, 2, 4))
    assert first == again and len(set(first)) == 300 and not set(first) & set(other)


def test_loss_mask_leaves_out_prompts_jumps_and_what_is_silent(scripts: Any) -> None:
    task = scripts.task
    data = scripts.sft.batches(
        task.problems(1, 12), 16, silent=frozenset({"jump", "-"}), jump=0.3, chooser=random.Random(0)
    )
    tokens, mask = next(data)
    vocabulary = task.vocabulary()
    wrong = 0
    for row, carries in zip(tokens.tolist(), mask.tolist(), strict=True):
        words = [vocabulary[i] for i in row]
        start = words.index("from") + 2
        assert carries[: start - 1] == [0.0] * (start - 1), "prompts carry no loss"
        total = int(words[start - 1])
        for place in range(start, start + 36, 3):
            _, term, result = words[place : place + 3]
            right = eval(f"{total} {term}") % 100
            total = int(result)
            assert carries[place - 1 : place + 1] == [1.0, 1.0]
            if total != right:  # an arbitrary total, from which the working goes on
                wrong += 1
                assert carries[place + 1] == 0.0
            elif term.startswith("-"):
                assert carries[place + 1] == 0.0
        assert carries[start + 35 :] == [1.0]
    assert 0.15 * 16 * 12 < wrong < 0.45 * 16 * 12


def test_accuracy_by_kind_counts_what_is_likeliest(scripts: Any) -> None:
    class Knows(torch.nn.Module):
        """Finds the next word of the right working likeliest, but for what comes behind a negative term."""

        def forward(self, ids: torch.Tensor) -> SimpleNamespace:
            end = torch.full_like(ids[:, :1], scripts.sft.IDS[scripts.task.EOS])
            following = torch.cat([ids[:, 1:], end], dim=1)
            spoiled = (ids == scripts.sft.IDS["-83"]) | (ids == scripts.sft.IDS["-65"])
            return SimpleNamespace(logits=torch.nn.functional.one_hot(following * ~spoiled, 109).float())

    known = scripts.sft.accuracy_by_kind(Knows(), scripts.task.problems(1, 30), 5)
    assert known == {"then": 1.0, "term": 1.0, "+": 1.0, "-": 0.0, "end": 1.0}


def test_same_seed_same_student_and_silence_matters(scripts: Any, made: Made, tmp_path: Path) -> None:
    prepare = scripts.prepare
    sizes = prepare.Sizes(num_terms=TERMS, batch_size=4, student_steps=2)
    weights = {}
    for name, regime, seed in (("a", "far", 1), ("b", "far", 1), ("c", "near", 1), ("d", "far", 2)):
        prepare.write_student(tmp_path / name, made.home / "base", sizes, regime=regime, seed=seed)
        weights[name] = prepare.load(tmp_path / name).lm_head.weight
    assert torch.equal(weights["a"], weights["b"])
    assert not torch.equal(weights["a"], weights["c"]) and not torch.equal(weights["a"], weights["d"])


def test_the_suite_measures_start_control_and_methods(scripts: Any, made: Made) -> None:
    table = json.loads((made.out / "table.json").read_text())
    rows = {(row["method"], row["budget"]): row for row in table["rows"]}
    assert set(rows) == {("start", None), ("control", None), ("full", None), ("teachability-raw", 0.1)}
    assert all(row["seeds"] == [1] for row in rows.values()) and table["runs"]["missing"] == 0
    # The control's own divergence, by transformers in float64, is what the suite measures through Megatron.
    load = scripts.prepare.load
    for method, student in (("start", "student-1"), ("control", "control/student-1")):
        expected = scripts.control.divergence(
            load(made.home / "teacher"), load(made.home / REGIME / student), made.home / REGIME / "heldout.jsonl"
        )
        assert rows[method, None]["measures"]["kl_forward"]["mean"] == pytest.approx(expected, rel=1e-4)
    choice = json.loads((made.home / REGIME / "control/choice.json").read_text())
    assert choice["chosen_lr"] == float(min(choice["validation_kl_forward"], key=choice["validation_kl_forward"].get))


def test_packed_records_go_on_as_they_were(scripts: Any, made: Made, tmp_path: Path) -> None:
    packed, copy = tmp_path / "far.jsonl", tmp_path / "suite"
    count = scripts.results.pack(made.out, packed)
    assert count == len(list((made.out / "runs").rglob("record.json"))) == 6  # two untrained, two cells of two rates
    assert scripts.results.unpack(packed, copy) == count
    for path in (made.out / "runs").rglob("record.json"):
        old, new = (json.loads((base / path.relative_to(made.out)).read_text()) for base in (made.out, copy))
        old.pop("host")
        assert new == old
    assert scripts.results.unpack(packed, copy) == 0, "records that are there stay"
    assert cli.run(["suite", "run", f"--suite={made.suite}", f"--out={copy}"]) == 0
    assert not list((copy / "runs").rglob("metrics.jsonl")), "nothing was trained again"
    first, second = (json.loads((base / "table.json").read_text())["rows"] for base in (made.out, copy))
    assert first == second


def test_plot(scripts: ModuleType, made: Made, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scripts.results.plot({REGIME: made.out}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
