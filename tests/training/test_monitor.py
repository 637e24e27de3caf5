"""Every figure of the selection in metrics.jsonl, and the dumped tokens, against NumPy on the gathered statistics."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_taopd.cli import parse
from megatron_taopd.commands.common import ranks
from megatron_taopd.commands.train import run_training
from megatron_taopd.config import TrainConfig
from megatron_taopd.teachability import SelectionConfig, TokenStatistics
from megatron_taopd.training.hooks.base import Hook
from megatron_taopd.training.kept_tokens import evenly_chosen, write_kept_tokens
from megatron_taopd.training.monitor import Monitor
from tests.data.test_pieces import byte_tokenizer
from tests.oracle.cases import STUDENT_VOCAB, make_pair
from tests.teachability.test_selection import reference_keep

# name -> (world size, flags)
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "dp2": (2, ()),
    "cp2": (2, ("--context-parallel-size=2",)),
    "pp2": (2, ("--pipeline-model-parallel-size=2",)),
    "tp2": (2, ("--tensor-model-parallel-size=2",)),
    "carried-one": (1, ("--selection-scope=carried",)),
    "carried-cp2-packed": (2, ("--selection-scope=carried", "--context-parallel-size=2", "--packed-sequences")),
}
COMPARED = ("teachability", "entropy", "tip", "prefix")
RATIO, STOP, BATCH, DUMPED = 0.15, 2, 8, 3
Rows = dict[str, np.ndarray]


class Recorder(Hook):
    """All columns of each step, as this rank has them; nothing off the last stage."""

    def __init__(self) -> None:
        self.steps: list[Rows] = []

    def on_step(self, trainer: Any, metrics: dict[str, float]) -> None:
        _, outcome = trainer.last_step
        rows: Rows = {}
        if outcome.scored is not None:
            rows = {f.name: getattr(outcome.scored.statistics, f.name).numpy() for f in fields(TokenStatistics)}
            for name in ("D_norm", "C_norm", "H_norm", "score", "keep"):
                rows[name] = getattr(outcome.selection, name).numpy()
            rows["token"] = outcome.scored.token_ids_R.numpy()
            rows["sample"], rows["position"] = outcome.scored.sample_index_R.numpy(), outcome.scored.position_R.numpy()
        self.steps.append(rows)


def run_recorded(words: list[str]) -> list[Rows]:
    """Runs in every rank."""
    config: TrainConfig = parse(TrainConfig, words, name="train")
    recorder = Recorder()
    with ranks(config.parallel, seed=config.seed):
        run_training(config, further_hooks=[recorder])
    return recorder.steps


def gathered(per_rank: list[list[Rows]]) -> list[Rows]:
    """All ranks' rows of each step by response and position; a row that several ranks have is taken once."""
    steps = []
    for parts in zip(*per_rank, strict=True):
        parts = [part for part in parts if part]
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        _, first = np.unique(rows["sample"] * 10_000 + rows["position"], return_index=True)
        steps.append({name: values[first] for name, values in rows.items()})
    return steps


def make_long_rollouts(path: Path, *, count: int) -> list[dict[str, Any]]:
    """Responses on both sides of a bucket's edge; every second one ends with the stop token, one has it inside."""
    rng = random.Random(3)
    lines = []
    for index in range(count):
        response = [rng.randrange(3, STUDENT_VOCAB) for _ in range(rng.randrange(3, 30))]
        if index % 2:
            response[-1] = STOP
        if index == 4:
            response[1] = STOP
        prompt = [rng.randrange(3, STUDENT_VOCAB) for _ in range(rng.randrange(1, 6))]
        reason = "stop" if index % 2 else "length"
        lines.append({"id": f"r{index}", "prompt_tokens": prompt, "response_tokens": response, "finish_reason": reason})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def words_of(root: Path, out: str, *flags: str) -> list[str]:
    return [
        f"--student={root / 'student'}",
        f"--teacher={root / 'teacher'}",
        "--rollout-engine=file",
        f"--rollout-data={root / 'rollouts.jsonl'}",
        f"--global-batch-size={BATCH}",
        "--micro-batch-size=2",
        "--lr=1e-3",
        "--adam-eps=1e-3",
        f"--log-dir={root / out}",
        *flags,
    ]


def metrics_of(root: Path, out: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (root / out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("monitor")
    make_pair(root, "qwen3", tied_student=True)
    make_long_rollouts(root / "rollouts.jsonl", count=24)
    return root


@pytest.fixture(scope="module")
def runs(pool, root: Path) -> Any:
    """``runs(name)``: the gathered rows of each step of a run; each run is made once."""
    made: dict[str, list[Rows]] = {}

    def get(name: str) -> list[Rows]:
        if name not in made:
            world_size, flags = RUNS[name]
            compared = [f"--monitor-selectors={selector}" for selector in COMPARED]
            words = words_of(
                root, name, "--train-iters=3", f"--keep-ratio={RATIO}", "--selector=divergence", *flags, *compared
            )
            words += ["--monitor-interval=2", "--dump-kept-interval=2", f"--dump-kept-responses={DUMPED}"]
            made[name] = gathered(pool(world_size).run(run_recorded, words))
        return made[name]

    return get


def naive_figures(rows: Rows, *, compare: bool) -> dict[str, float]:
    """From the definitions of docs/metrics.md."""
    d, c, h = (rows[name].astype(np.float64) for name in ("D", "C", "H"))
    keep, count = rows["keep"], len(rows["keep"])
    figures = {
        f"{name}_q{percent:02d}": np.percentile(values, percent)
        for name, values in (("D", d), ("C", c), ("H", h))
        for percent in (5, 25, 50, 75, 95)
    }
    figures["log_C_q05"] = np.log(np.percentile(c, 5))
    figures["low_C_share"] = sum(c < 0.5) / count
    figures["C_gap"] = np.mean(c - rows["C_topk"])
    figures["teacher_top5_share"] = sum(rows["rank_in_teacher"] <= 4) / count
    figures["keep_ratio"] = sum(keep) / count
    sure, far = h < np.median(h), d >= np.median(d)
    for name, inside in (("Q1", ~sure & far), ("Q2", ~sure & ~far), ("Q3", sure & far), ("Q4", sure & ~far)):
        figures[f"quadrant_share/{name}"] = sum(inside) / count
        figures[f"quadrant_keep_ratio/{name}"] = sum(keep & inside) / sum(inside)
    early = rows["position"] < 16
    figures["keep_ratio_by_position/0-15"] = sum(keep[early]) / sum(early)
    figures["keep_ratio_by_position/16-63"] = sum(keep[~early]) / sum(~early)
    stops = rows["token"] == STOP
    figures["stop_token_share"] = sum(stops) / count
    figures["stop_token_keep_ratio"] = sum(keep & stops) / sum(stops)
    figures["stop_token_teacher_logprob"] = np.mean(rows["teacher_logprob"][stops].astype(np.float64))
    if compare:
        statistics = TokenStatistics(**{f.name: torch.tensor(rows[f.name]) for f in fields(TokenStatistics)})
        for name in COMPARED:
            asked = SelectionConfig(selector=name, keep_ratio=RATIO)
            other = np.array(reference_keep(statistics, rows["sample"].tolist(), rows["position"].tolist(), asked))
            figures[f"kept_overlap/{name}"] = 2 * sum(keep & other) / (sum(keep) + sum(other))
    return figures


@pytest.mark.parametrize("name", RUNS)
def test_figures_are_those_of_the_gathered_statistics(runs: Any, root: Path, name: str) -> None:
    steps = runs(name)
    metrics = metrics_of(root, name)
    assert len(steps) == len(metrics) == 3
    for step, (rows, told) in enumerate(zip(steps, metrics, strict=True)):
        wanted = naive_figures(rows, compare=step == 1)
        assert {key: told[key] for key in wanted} == pytest.approx(wanted, rel=1e-9, abs=1e-9)
        mine = ("quadrant", "keep_ratio_by", "stop_token", "kept_overlap", "log_C")
        assert {key for key in told if key.startswith(mine)} == {key for key in wanted if key.startswith(mine)}
        if name.startswith("carried") and step:
            # what scaled the rows is the average of earlier steps, and has another name
            scaled = (rows["D"] - told["carried_D_q05"]) / (told["carried_D_q95"] - told["carried_D_q05"])
            assert np.clip(scaled, 0, 1) == pytest.approx(rows["D_norm"], abs=1e-6)
        else:
            assert "carried_D_q05" not in told


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("one", "carried-one")])
def test_every_layout_tells_the_same(runs: Any, root: Path, name: str) -> None:
    alone = "carried-one" if name.startswith("carried") else "one"
    rows = len(runs(alone)[0]["keep"])
    runs(name)
    for a, b in zip(metrics_of(root, alone), metrics_of(root, name), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not key.startswith(("time_", "tokens_per_second")):
                # a row at the very edge of a share may fall on the other side by rounding
                assert b[key] == pytest.approx(a[key], rel=1e-3, abs=2 / rows), key


@pytest.mark.parametrize("name", RUNS)
def test_dumped_tokens_are_those_rows(runs: Any, root: Path, name: str) -> None:
    rows = runs(name)[1]
    directory = root / name / "kept_tokens"
    assert [file.name for file in directory.iterdir()] == ["iter_0000002.jsonl"]
    lines = [json.loads(line) for line in (directory / "iter_0000002.jsonl").read_text().splitlines()]
    recorded = [json.loads(line) for line in (root / "rollouts.jsonl").read_text().splitlines()]
    assert [line["sample_index"] for line in lines] == [0, 2, 5]
    for line in lines:
        source = recorded[BATCH + line["sample_index"]]  # of the second step
        assert (line["id"], line["prompt_tokens"]) == (source["id"], source["prompt_tokens"])
        assert (line["token_ids"], line["finish_reason"]) == (source["response_tokens"], source["finish_reason"])
        assert (line["iteration"], line["selector"], line["keep_ratio_asked"]) == (2, "divergence", RATIO)
        own = rows["sample"] == line["sample_index"]
        for column in ("D", "C", "C_topk", "H", "kl_forward", "student_logprob", "teacher_logprob", "score", "C_norm"):
            assert line[column] == pytest.approx(rows[column][own].tolist(), rel=1e-5, abs=1e-12), column
        assert line["keep"] == rows["keep"][own].tolist()
        assert line["rank_in_teacher"] == rows["rank_in_teacher"][own].tolist()
        assert not {"pieces", "prompt", "teacher"} & line.keys()


def test_dump_has_text_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    text = tokenizer("aé")["input_ids"]
    write_kept_tokens(
        tmp_path / "deep" / "x.jsonl", [{"prompt_tokens": text, "token_ids": text}], tokenizer, iteration=4
    )
    (file,) = (tmp_path / "deep").iterdir()
    assert json.loads(file.read_text()) == {
        "iteration": 4,
        "prompt_tokens": text,
        "token_ids": text,
        "prompt": "aé",
        "pieces": ["a", "", "é"],
    }


def test_responses_are_spread_over_the_batch() -> None:
    assert (
        evenly_chosen(8, 3) == [0, 2, 5] and evenly_chosen(2, 5) == [0, 1] and evenly_chosen(64, 4) == [0, 16, 32, 48]
    )


def test_interrupted_run_drops_dumps_past_its_checkpoint(pool, root: Path) -> None:
    flags = ["--selector=random", "--dump-kept-interval=1", "--dump-kept-responses=1"]
    save = [f"--save={root / 'dumps' / 'checkpoints'}", "--save-interval=2"]
    pool(1).run(run_recorded, words_of(root, "dumps", "--train-iters=4", *flags, *save))
    directory = root / "dumps" / "kept_tokens"
    late = (directory / "iter_0000003.jsonl").read_bytes()
    for number in (3, 9):
        (directory / f"iter_000000{number}.jsonl").write_text("of an attempt that was lost")
    (root / "dumps" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    load = [f"--load={root / 'dumps' / 'checkpoints'}"]
    pool(1).run(run_recorded, words_of(root, "dumps", "--train-iters=3", *flags, *load))
    assert sorted(file.name for file in directory.iterdir()) == [f"iter_000000{n}.jsonl" for n in (1, 2, 3)]
    assert (directory / "iter_0000003.jsonl").read_bytes() == late


def test_warns_when_scores_begin_to_mean_little(caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("megatron_taopd"), "propagate", True)
    config: TrainConfig = parse(TrainConfig, words_of(Path("/x"), "out"), name="train")
    pair: Any = SimpleNamespace(student=SimpleNamespace(hf=SimpleNamespace(eos_token_ids=(STOP,))))
    monitor = Monitor(config, pair)
    spread = {"C_q05": 0.2, "C_q95": 0.9}
    for iteration, share in enumerate((0.949, 0.95, 0.99, 0.9, 0.97), 1):
        monitor.warn({"iteration": iteration, "teacher_top5_share": share, **spread})
    assert [record.getMessage()[:21] for record in caplog.records] == ["iteration 2: 95.00% o", "iteration 5: 97.00% o"]
    assert all("the teacher's best 5: student" in record.getMessage() for record in caplog.records)
    caplog.clear()
    few = parse(TrainConfig, words_of(Path("/x"), "out", "--support-k=2"), name="train")
    Monitor(few, pair).warn({"iteration": 1, "teacher_top5_share": 0.99, **spread})
    assert "the teacher's best 2: student" in caplog.text
    caplog.clear()
    narrow = {"iteration": 6, "teacher_top5_share": 0.5, "C_q05": 0.991, "C_q95": 1.0}
    monitor.warn(narrow)
    assert "--compatibility-scale quantile" in caplog.text and "0.009" in caplog.text
    caplog.clear()
    for selector in ("--selector=tip", "--compatibility-scale=raw"):
        Monitor(parse(TrainConfig, words_of(Path("/x"), "out", selector), name="train"), pair).warn(narrow)
    assert not caplog.records
