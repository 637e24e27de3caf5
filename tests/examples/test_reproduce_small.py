"""The small reproduction in a short form: its task, its models, its control, and one suite with all of it."""

from __future__ import annotations

import json
import random
import sys
import threading
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from megatron_taopd import cli
from megatron_taopd.evaluation.tasks import load_tasks
from megatron_taopd.evaluation.verdicts import Judge
from megatron_taopd.suite.config import read_suite
from megatron_taopd.suite.plan import Plan
from tests.needs import needs_module
from tests.report.pages import parse, table

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
        import collapse
        import contexts
        import control
        import prepare
        import results
        import sft
        import task

        modules = (collapse, contexts, control, prepare, results, sft, task)
        yield SimpleNamespace(**{module.__name__: module for module in modules})
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and str(SCRIPTS) in str(sys.modules[name].__file__):
                del sys.modules[name]


@dataclass
class Made:
    """What the whole reproduction left behind."""

    home: Path
    suite: Path
    out: Path
    sizes: Any


@pytest.fixture(scope="module")
def made(scripts: Any, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Everything of one regime, made by the scripts at tiny sizes."""
    needs_module("reasoning_gym")
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
    _control(scripts, suite, sizes)
    out = home / REGIME / "suite"
    assert cli.run(["suite", "run", f"--suite={suite}", f"--out={out}"]) == 0
    return Made(home, suite, out, sizes)


def _control(scripts: Any, suite: Path, sizes: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.control, "Sizes", lambda: sizes)
        patch.setattr(sys, "argv", ["control.py", str(suite)])
        scripts.control.main()


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
    needs_module("reasoning_gym")
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


def test_the_suites_verdict_is_the_scorers(scripts: Any, made: Made) -> None:
    """Exact match of the last number, on right, wrong, cut off and foreign responses, and on a student's own."""
    problem = next(scripts.task.problems(9, TERMS))
    words = scripts.task.working(problem)[0][:-1]
    wrong = str((int(problem.answer) + 1) % 100)
    responses = [" ".join(words), " ".join([*words[:-1], wrong]), " ".join([*words, "then"])]
    responses += [" ".join(words[:end]) for end in range(len(words))]
    responses += [f"{problem.answer} then -{problem.answer}", f"+{problem.answer}", "then then", "", problem.answer]
    asked = [(response, problem.answer) for response in responses]
    for line in (made.home / REGIME / "heldout.jsonl").read_text().splitlines():
        rollout = json.loads(line)
        text = " ".join(scripts.task.vocabulary()[token] for token in rollout["response_tokens"])
        last = [word for word in text.split() if word.isdigit()][-1:]
        asked += [(text, gold) for gold in (rollout["answer"], *last)]
    (task,) = load_tasks([yaml.safe_load(made.suite.read_text())["held_out"]["tasks"][0]])
    judge = Judge(task)
    for response, gold in asked:
        wanted = scripts.task.score(response, gold)
        assert judge(response, replace(task.problems[0], gold=gold)).correct == (wanted == 1.0), (response, gold)
    assert scripts.task.score(*asked[0]) == 1.0 and scripts.task.score(*asked[1]) == 0.0


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


def test_two_processes_make_a_thing_once(scripts: Any, tmp_path: Path) -> None:
    """The second waits for the first, and finds what it made; what a killed process left aside is in nobody's way."""
    path = tmp_path / "home/thing"
    (path.parent / ".partial-thing").mkdir(parents=True)
    (path.parent / ".partial-thing/rest").touch()
    begun, go_on, made = threading.Event(), threading.Event(), []

    def write(aside: Path, who: str) -> None:
        begun.set()
        assert go_on.wait(30)
        aside.mkdir()
        made.append(who)

    threads = [
        threading.Thread(target=scripts.prepare.make, args=(path, lambda aside, who=who: write(aside, who)))
        for who in ("first", "second")
    ]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive() and not path.exists()
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert made == ["first"] and path.is_dir() and not list(path.iterdir())


def test_a_chosen_control_is_replaced_where_the_choice_changed_alone(scripts: Any, made: Made) -> None:
    chosen = made.home / REGIME / "control/student-1"
    changed, weights = chosen.stat().st_ctime_ns, (chosen / "model.safetensors").read_bytes()
    _control(scripts, made.suite, made.sizes)
    assert chosen.stat().st_ctime_ns == changed, "another process may be reading it"
    choice = json.loads((chosen.parent / "choice.json").read_text())
    (other,) = {0.001, 0.01} - {choice["chosen_lr"]}
    of_other = (chosen.parent / f"lr-{other:g}/student-1/model.safetensors").read_bytes()
    (chosen / "model.safetensors").write_bytes(of_other)
    _control(scripts, made.suite, made.sizes)
    assert (chosen / "model.safetensors").read_bytes() == weights != of_other


def test_where_the_teachers_mass_lies(scripts: Any, made: Made) -> None:
    """The table of the set-up has what transformers gives for the same responses in float64."""
    length = scripts.task.response_length(TERMS)
    text = scripts.contexts.contexts(made.home, [REGIME], num_prompts=3, response_length=length)
    teacher, student = (scripts.prepare.load(made.home / name).double() for name in ("teacher", f"{REGIME}/student-1"))
    probabilities = []
    for line in (made.home / REGIME / "set_up/rollouts.jsonl").read_text().splitlines():
        rollout = json.loads(line)
        ids = torch.tensor([rollout["prompt_tokens"] + rollout["response_tokens"]])
        rows = slice(len(rollout["prompt_tokens"]) - 1, -1)
        probabilities.append([model(ids).logits[0, rows].softmax(-1) for model in (teacher, student)])
    p_t, p_s = (torch.cat(parts).detach() for parts in zip(*probabilities, strict=True))
    divergence = (p_t * (p_t / p_s).log()).sum(-1)
    worst = divergence.argsort(descending=True)[: round(0.1 * len(divergence))]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines()]
    assert lines[0][1] == "q05 of C, `far`" and [line[0] for line in lines[2:5]] == ["2", "4", "16"]
    for k, *found in lines[2:5]:
        c = p_t.gather(-1, p_s.topk(int(k)).indices).sum(-1)
        assert float(found[0]) == pytest.approx(float(c.quantile(0.05)), rel=1e-2)
        assert [float(share.removesuffix(" %")) for share in found[1:]] == [
            pytest.approx(100 * float((c < 0.5).double().mean()), abs=0.06),
            pytest.approx(100 * float((c[worst] < 0.5).double().mean()), abs=0.6),
        ]
    assert f"{len(divergence)} positions, mean KL_f {float(divergence.mean()):.3f}" in text


def row(method: str, budget: float | None, values: dict[str, float], **changes: Any) -> dict[str, Any]:
    """Of a table, as far as collapse is concerned."""
    measures = {"kl_forward": {"values": values}}
    whole = {"method": method, "budget": budget, "trains": True, "missing": [], "failed": [], "measures": measures}
    return {**whole, **changes}


def test_what_collapsed_is_repeated_at_a_third_of_the_smallest_rate(scripts: Any, made: Made, tmp_path: Path) -> None:
    start = row("start", None, {"1": 0.4, "2": 0.6}, trains=False)
    rows = [
        start,
        row("control", None, {"1": 0.9, "2": 0.9}, trains=False),
        row("full", None, {"1": 0.45, "2": 0.5}),
        row("tip", 0.05, {"1": 0.9, "2": 0.2}),
        row("tip", 0.1, {"1": 0.1, "2": 0.1}),
        row("entropy", 0.05, {"1": 0.1}, failed=[2]),
        row("entropy", 0.1, {}, missing=[1, 2]),
        row("random", 0.05, {}, missing=[1, 2]),
        row("random", 0.1, {"1": 0.9}, missing=[2]),
    ]
    cells = [
        {"method": "entropy", "budget": 0.1, "chosen": 1e-3},
        {"method": "random", "budget": 0.05, "chosen": None},
    ]
    found = scripts.collapse.collapsed_rows({"rows": rows, "sweep": {"cells": cells}})
    assert [(r.method, r.budget) for r in found] == [("tip", 0.05), ("entropy", 0.05), ("random", 0.05)]
    assert found[0].why == "0.5500 nats, and 0.5000 untrained"
    assert scripts.collapse.collapsed_rows({"rows": [{**start, "missing": [1]}, *rows[3:]], "sweep": None}) == []

    content = yaml.safe_load((SCRIPTS / "far.yaml").read_text())
    again = scripts.collapse.suite_of(content, [*found, scripts.collapse.Collapsed("tip", 0.1, "too")])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(again))
    suite = read_suite(tmp_path / "again.yaml")
    assert {method.name: method.rates for method in suite.methods} == {
        "start": {},
        "tip": {0.05: (1e-4,), 0.1: (1e-4,)},
        "entropy": {0.05: (1e-4,)},
        "random": {0.05: (1e-4,)},
    }
    assert suite.seeds == (1, 2, 3, 4, 5) and suite.sweep is None and suite.settings["train_iters"] == 24


def test_the_suite_that_repeats_what_collapsed_runs(scripts: Any, made: Made, tmp_path: Path) -> None:
    """As if everything that was trained here had collapsed; then as if nothing had, which removes the file."""
    copy, again = tmp_path / "suite", tmp_path / "again.yaml"
    copy.mkdir()
    table = json.loads((made.out / "table.json").read_text())
    for worse in (1.0, -1.0):
        for entry in table["rows"]:
            if entry["trains"]:
                entry["measures"]["kl_forward"]["values"] = {"1": 9.0 * worse}
        (copy / "table.json").write_text(json.dumps(table))
        (copy / "suite.yaml").write_text((made.out / "suite.yaml").read_text())
        assert scripts.results.write_collapsed(copy, again) == (2 if worse > 0 else 0)
        assert again.exists() == (worse > 0)
        if worse > 0:
            plan = Plan(read_suite(again), tmp_path / "out")
            plan.check()
            assert {str(cell): cell.rates for cell in plan.cells} == {
                "start": (),
                "full": (pytest.approx(1e-3 / 3, rel=1e-3),),
                "teachability-raw 0.1": (pytest.approx(1e-3 / 3, rel=1e-3),),
            }


def test_page_of_the_suite(made: Made) -> None:
    assert cli.run(["report", f"--suite={made.out}"]) == 0
    page = parse((made.out / "report.html").read_text())
    rows = table(page, "All rows, on the held-out set")
    assert [line[0] for line in rows[1:]] == ["start", "control", "full", "teachability-raw"]
    kl = json.loads((made.out / "table.json").read_text())["rows"][0]["measures"]["kl_forward"]["mean"]
    assert float(rows[1][rows[0].index("forward KL, nats/token")]) == pytest.approx(kl, rel=1e-2)


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
    needs_module("matplotlib")
    scripts.results.plot({REGIME: made.out}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
