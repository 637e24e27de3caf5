"""What the benchmarks measure with: memory, traffic, checks, targets, reports."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import bench_loss
import bench_score
import bench_tp
import common
import contenders
import pytest
import report
import targets
import torch
import wire
from problem import Shape, make_problem

from megatron_taopd.teachability import SelectionConfig, select, token_statistics
from megatron_taopd.teachability.statistics import bytes_per_row

SHAPE = Shape(tokens=96, student_hidden=16, teacher_hidden=24, vocab=300)
CHUNK_BYTES = 20 * 4 * SHAPE.vocab


def allocate_and_free(mebibytes: int) -> None:
    torch.ones(mebibytes, common.MIB // 4)


def peak_of_allocation(mebibytes: int) -> common.Memory:
    return common.peak_memory(partial(allocate_and_free, mebibytes))


def test_peak_memory_is_that_of_one_call():
    memory = common.in_fresh_process(peak_of_allocation, 96)
    assert memory.tensors == 96 * common.MIB
    assert 94 * common.MIB <= memory.resident <= 110 * common.MIB


def die(code: int) -> None:
    raise SystemExit(code)


def test_a_process_that_dies_is_reported():
    with pytest.raises(SystemExit, match="die.*exit code 3"):
        common.in_fresh_process(die, 3)


def collectives() -> tuple[dict[str, float], str]:
    traffic = wire.Wire()
    with traffic.counting():
        torch.distributed.all_reduce(torch.zeros(10))
        torch.distributed.all_to_all_single(torch.zeros(4), torch.zeros(4))
        parts = [torch.zeros(3, dtype=torch.float64) for _ in range(2)]
        torch.distributed.all_gather(parts, torch.zeros(3, dtype=torch.float64))
        try:
            torch.distributed.reduce_scatter(torch.zeros(1), [torch.zeros(1), torch.zeros(1)])
        except NotImplementedError as error:
            refusal = str(error)
    torch.distributed.all_reduce(torch.zeros(10))  # not counted any more
    return dict(traffic.received), refusal


def test_received_bytes_of_known_collectives(pool):
    for received, refusal in pool(2).run(collectives):
        # A ring brings 2 (P - 1) / P of an all-reduced tensor, and every other rank's part of a gathered one.
        assert received == {
            "elsewhere (all_reduce)": 40.0,
            "elsewhere (all_to_all_single)": 8.0,
            "elsewhere (all_gather)": 24.0,
        }
        assert "torch.distributed.reduce_scatter was called" in refusal


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_our_lines_pass_the_check(kl):
    problem = make_problem(SHAPE)
    lines = bench_loss.entries(SHAPE, kl, CHUNK_BYTES)
    for name in ("ours, ρ = 1", "ours, ρ = 0.05", "ours, ρ = 0.1, with scoring of all rows"):
        reference = bench_loss.answer_of(contenders.dense_torch(kl, lines[name].rows), problem)
        bench_loss.check(name, lines[name].make(), problem, reference)


@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize("line", ["TRL GKD loss", "TRL chunked (DistillationTrainer)", "Liger eager, its chunk (1024)"])
def test_peers_give_the_same_loss_and_gradient(line, kl):
    entry = bench_loss.entries(SHAPE, kl, CHUNK_BYTES)[line]
    reason = common.missing_peer(*entry.packages)
    if reason is not None:
        pytest.skip(reason)
    problem = make_problem(SHAPE)
    bench_loss.check(line, entry.make(), problem, bench_loss.answer_of(contenders.dense_torch(kl), problem))


def test_the_check_finds_a_wrong_gradient():
    def scaled(problem):
        loss = contenders.dense_torch("reverse")(problem)
        problem.student_weight_VH.grad.mul_(1.01)
        return loss

    problem = make_problem(SHAPE)
    with pytest.raises(SystemExit, match="differ"):
        bench_loss.check("scaled", scaled, problem, bench_loss.answer_of(contenders.dense_torch("reverse"), problem))


def test_the_check_finds_a_nan():
    def broken(problem):
        return contenders.dense_torch("reverse")(problem) * math.nan

    problem = make_problem(SHAPE)
    with pytest.raises(SystemExit, match="differ"):
        bench_loss.check("broken", broken, problem, bench_loss.answer_of(contenders.dense_torch("reverse"), problem))


def test_python_selection_is_ours_in_upstream_mode():
    problem = make_problem(SHAPE, requires_grad=False)
    statistics = token_statistics(
        problem.student_hidden_TH,
        problem.teacher_hidden_TH,
        problem.token_ids_T,
        *contenders.heads(problem),
        support_mode="upstream",
    )
    keep = select(
        statistics,
        sample_index_R=torch.zeros_like(problem.token_ids_T),
        position_R=torch.arange(SHAPE.tokens),
        config=SelectionConfig(support_mode="upstream", keep_ratio=bench_score.KEEP_RATIO),
    ).keep
    assert bench_score.whole_log_probs_and_python(problem, 16) == keep.tolist()


def table(name: str, rows: list[dict], title: str = "Something: a shape") -> common.Table:
    return common.Table(name=name, title=title, columns={}, rows=rows)


def test_targets_are_met_or_not():
    rows = targets.targets_table(
        [
            table("score/1", [{"ratio_same_chunk": 1.1, "ratio_best_floor": 1.2}]),
            table("step", [{"contender": "ours", "processes": 1, "ratio": 1.4}, {"contender": "TRL", "ratio": 1.0}]),
            table("tp/k16", [{"ranks": 2, "phase": "scoring", "shape": "x", "k": 16, "ratio": 0.95}, {"ranks": 4}]),
            table(
                "growth",
                [
                    {"phase": "p", "axis": "T", "memory_per_unit": 300.0},
                    {"phase": "p", "axis": "T at 2 V", "memory_per_unit": 360.0},
                ],
            ),
            table("rollout", [{"case": "c", "batch": 4, "ratio": 1.0}]),
            table(
                "loss/1",
                [
                    {"contender": "ours, ρ = 1", "best": 6.0},
                    {"contender": "Liger compiled, our chunk", "best": 10.0},
                    {"contender": "ours, ρ = 0.05", "best_ratio": 0.5},
                ],
            ),
        ]
    ).rows
    assert [(row["value"], row["met"]) for row in rows] == [
        (1.1, True),
        (1.2, False),
        (0.5, False),
        (0.6, True),
        (1.2, False),
        (0.95, True),
        (1.4, False),
        (1.0, True),
    ]
    assert rows[5]["where"] == "x, K 16"


def test_the_formula_of_scoring_is_that_of_the_statistics():
    for k, ranks in ((8, 2), (16, 4)):
        assert sum(bench_tp.formula("scoring", SHAPE, ranks, k).values()) == bytes_per_row(k, ranks)


def test_results_go_between_the_marks_of_a_document(tmp_path: Path):
    data = [
        {
            "title": "A title",
            "command": "",
            "environment": {},
            "columns": {"name": "name", "value": "value"},
            "rows": [{"name": "a", "value": 1234.5}, {"name": "b", "value": None}],
            "notes": ["A note."],
        }
    ]
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.put_into(document, report.markdown(data))
    text = document.read_text()
    assert "| name | value |\n| --- | --: |\n| a | 1,234 |\n| b |  |" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    document.write_text("no marks")
    with pytest.raises(SystemExit, match="needs the marks"):
        report.put_into(document, "x")


def test_the_committed_json_is_compact():
    rows = [{"name": "a", "value": 1.5, "samples": [0.1] * 10}]
    short = [{"title": "A title", "columns": {"name": "name", "value": "value"}, "rows": rows}]
    assert json.loads(report.compact(short)) == short
    long = [{**short[0], "rows": rows * 10_000}]
    assert json.loads(report.compact(long))[0]["rows"][0] == {"name": "a", "value": 1.5}
