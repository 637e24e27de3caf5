"""``--selection-scope carried``: the same positions at every layout, no second reading, and resumed to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_taopd import cli
from tests.oracle.cases import make_pair, make_rollouts
from tests.training.recording import Kept, merged, run_and_record

# name -> (world size, micro-batch size, flags)
CUTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "one": (1, 2, ()),
    "mbs4": (1, 4, ()),
    "tp2-sp": (2, 2, ("--tensor-model-parallel-size=2", "--sequence-parallel")),
    "pp2": (2, 1, ("--pipeline-model-parallel-size=2",)),
    "dp2": (2, 2, ()),
    "cp2-packed": (2, 2, ("--context-parallel-size=2", "--packed-sequences")),
}
ASKED = 0.15


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("carried")
    make_pair(root, "qwen3", tied_student=True)
    make_rollouts(root / "rollouts.jsonl", count=40, seed=5)
    return root


def words(root: Path, out: str, micro_batch_size: int, *flags: str) -> list[str]:
    return [
        "train",
        f"--student={root / 'student'}",
        f"--teacher={root / 'teacher'}",
        "--rollout-engine=file",
        f"--rollout-data={root / 'rollouts.jsonl'}",
        "--global-batch-size=8",
        f"--micro-batch-size={micro_batch_size}",
        "--train-iters=5",
        f"--keep-ratio={ASKED}",
        "--selection-scope=carried",
        "--loss=reverse_kl",
        "--lr=1e-3",
        "--adam-eps=1e-3",
        f"--log-dir={root / out}",
        f"--export-hf={root / out / 'hf'}",
        *flags,
    ]


def metrics_of(root: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(pool, root: Path) -> list[Kept]:
    interval = "--carried-agreement-interval=2"
    return merged(pool(1).run(run_and_record, words(root, "one", CUTS["one"][1], interval)))


def kept_places(rows: Kept) -> set[tuple[int, int]]:
    return {place for place, (keep, _) in rows.items() if keep}


@pytest.mark.parametrize("name", [name for name in CUTS if name != "one"])
def test_same_kept_positions_at_every_layout(pool, root: Path, alone: list[Kept], name: str) -> None:
    world_size, micro_batch_size, flags = CUTS[name]
    steps = merged(pool(world_size).run(run_and_record, words(root, name, micro_batch_size, *flags)))
    assert len(steps) == len(alone) == 5
    for got, wanted in zip(steps, alone, strict=True):
        assert kept_places(got) == kept_places(wanted)
        for place, (_, score) in wanted.items():
            assert got[place][1] == pytest.approx(score, abs=1e-3)
    for a, b in zip(metrics_of(root, "one"), metrics_of(root, name), strict=True):
        for key in ("loss", "grad_norm", "mean_D", "kl_forward", "kept_kl_forward", "D_q95"):
            assert b[key] == pytest.approx(a[key], rel=5e-4), f"{name} iteration {a['iteration']} {key}"
    first, after = (load_file(root / n / "hf" / "model.safetensors") for n in ("one", name))
    start = load_file(root / "student" / "model.safetensors")
    moved = sum((first[n] - start[n]).double().square().sum() for n in start).sqrt()
    apart = sum((first[n] - after[n]).double().square().sum() for n in start).sqrt()
    assert 0 < apart / moved + 1e-30 < 1e-2


def test_metrics_tell_budget_agreement_and_the_saved_forward(root: Path, alone: list[Kept]) -> None:
    rows = metrics_of(root, "one")
    assert [row["student_scoring_forwards"] for row in rows] == [1, 0, 0, 0, 0]
    assert [("carried_agreement" in row, "carried_cut" in row) for row in rows] == [
        (False, False),
        (True, True),
        (False, True),
        (True, True),
        (False, True),
    ]
    for row, kept in zip(rows, alone, strict=True):
        assert row["num_kept_tokens"] == len(kept_places(kept))
        assert row["keep_ratio_asked"] == ASKED
        assert row.get("carried_agreement", 1) > 0.6
    # Each of 8 responses keeps at least one; beyond that the mean is near what was asked.
    assert sum(row["keep_ratio"] for row in rows[1:]) / 4 == pytest.approx(ASKED, abs=0.06)


def test_first_step_is_the_global_one(pool, root: Path, alone: list[Kept]) -> None:
    flags = ["--selection-scope=global", "--train-iters=1"]
    (exact,) = merged(pool(1).run(run_and_record, words(root, "global", 2, *flags)))
    assert exact == alone[0]


def run_in_two_passes(words: list[str]) -> list[Kept]:
    """As a scope that needs statistics to select does it: the student reads the batch before the training forward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_taopd.training.phases.READS_NO_STATISTICS", frozenset())
        return run_and_record(words)


BY_PLACE: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "random": ("random", 1, ("--loss=sampled_reverse_kl",)),
    "full": ("full", 1, ()),
    "prefix-carried": ("prefix", 1, ("--selection-scope=carried",)),
    "full-pp2": ("full", 2, ("--pipeline-model-parallel-size=2",)),
}


@pytest.mark.parametrize("name", BY_PLACE)
def test_selectors_of_places_need_no_scoring_pass(pool, root: Path, name: str) -> None:
    """Either scope keeps the same rows and makes the same step without the student's pass."""
    selector, ranks, flags = BY_PLACE[name]
    runs = {}
    for way, run in (("once", run_and_record), ("twice", run_in_two_passes)):
        line = words(root, f"{name}-{way}", 2, f"--selector={selector}", "--train-iters=2", "--selection-scope=global")
        line += [flag for flag in flags if way == "once" or "scope" not in flag]
        if selector == "full":
            line = [word for word in line if not word.startswith("--keep-ratio")]
        runs[way] = merged(pool(ranks).run(run, line))
    assert runs["once"] == runs["twice"] and len(runs["once"]) == 2
    for once, twice in zip(*(metrics_of(root, f"{name}-{way}") for way in runs), strict=True):
        assert (once["student_scoring_forwards"], twice["student_scoring_forwards"]) == (0, 1)
        changed = {key for key in once if once[key] != twice[key]}
        assert once.keys() == twice.keys() and changed <= {"student_scoring_forwards", *TIMES}
    got, wanted = (load_file(root / f"{name}-{way}" / "hf" / "model.safetensors") for way in runs)
    for tensor_name, tensor in wanted.items():
        assert torch.equal(got[tensor_name], tensor), tensor_name


RESUMED: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ("--selector=q3_teachability",)),
    "tp2pp2sp-bf16": (
        4,
        (
            "--tensor-model-parallel-size=2",
            "--pipeline-model-parallel-size=2",
            "--sequence-parallel",
            "--bf16",
            "--use-distributed-optimizer",
        ),
    ),
}
TIMES = ("time_rollout", "time_score", "time_train", "time_step", "tokens_per_second")


def straight_and_resumed(root: Path, name: str) -> None:
    """Runs in every rank."""
    flags = RESUMED[name][1]
    cli.run(words(root, f"{name}-straight", 2, *flags))
    checkpoints = root / f"{name}-resumed" / "checkpoints"
    cli.run(words(root, f"{name}-resumed", 2, *flags, "--train-iters=3", f"--save={checkpoints}"))
    cli.run(words(root, f"{name}-resumed", 2, *flags, f"--save={checkpoints}", f"--load={checkpoints}"))


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_exact(pool, root: Path, name: str) -> None:
    pool(RESUMED[name][0]).run(straight_and_resumed, root, name)
    straight, resumed = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in metrics_of(root, f"{name}-{how}")]
        for how in ("straight", "resumed")
    )
    assert [row["student_scoring_forwards"] for row in resumed] == [1, 0, 0, 0, 0]
    assert resumed == straight
    wanted, got = (load_file(root / f"{name}-{how}" / "hf" / "model.safetensors") for how in ("straight", "resumed"))
    for tensor_name, tensor in wanted.items():
        assert torch.equal(got[tensor_name], tensor), tensor_name


def test_an_estimate_of_other_settings_is_not_taken_over(pool, root: Path) -> None:
    checkpoints = root / "settings" / "checkpoints"
    first = words(root, "settings", 2, "--train-iters=2", f"--save={checkpoints}")
    second = words(root, "settings", 2, "--train-iters=4", f"--load={checkpoints}", "--support-k=8")
    pool(1).run(run_and_record, first)
    pool(1).run(cli.run, second)
    assert [row["student_scoring_forwards"] for row in metrics_of(root, "settings")] == [1, 0, 1, 0]
