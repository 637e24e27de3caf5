"""Warm-up and fall-back: their steps are those of a run with that selector, at every layout and when resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_taopd import cli
from megatron_taopd.teachability.phases import Fallback, PhaseConfig
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.oracle.cases import STUDENT_VOCAB
from tests.training.test_monitor import make_long_rollouts, metrics_of, words_of

RATIO = 0.2
TIMES = ("time_rollout", "time_score", "time_train", "time_step", "tokens_per_second")
PHASES = ("full_selector_warmup", "fallback")
BUDGET = (f"--keep-ratio={RATIO}", "--selector=teachability_entropy", "--monitor-interval=1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phases")
    save_tiny_hf_model(root / "student", "qwen3", hidden_size=32, num_layers=2, vocab_size=STUDENT_VOCAB, seed=1)
    shutil.copytree(root / "student", root / "teacher")
    generator = torch.Generator().manual_seed(9)
    weights = load_file(root / "student" / "model.safetensors")
    # near enough for C not to be low everywhere
    weights = {name: w + 0.3 * w.std() * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(weights, root / "teacher" / "model.safetensors", metadata={"format": "pt"})
    make_long_rollouts(root / "rollouts.jsonl", count=40)
    return root


def train(root: Path, out: str, iters: int, *flags: str) -> None:
    """Runs in every rank."""
    cli.run(["train", *words_of(root, out, f"--train-iters={iters}", f"--export-hf={root / out / 'hf'}", *flags)])


def told(root: Path, out: str, *, but: tuple[str, ...] = TIMES) -> list[dict[str, float]]:
    """Metrics without those of some names."""
    return [{k: v for k, v in row.items() if k not in but} for row in metrics_of(root, out)]


def same_weights(root: Path, a: str, b: str) -> bool:
    first, second = (load_file(root / name / "hf" / "model.safetensors") for name in (a, b))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_warmup_is_a_full_run_and_then_the_selectors(pool, root: Path) -> None:
    """2 steps of --selector full, saved, and 2 more with the selector from there on: the same run in one."""
    checkpoints = root / "by-hand" / "checkpoints"
    pool(1).run(train, root, "by-hand", 2, "--selector=full", f"--save={checkpoints}")
    pool(1).run(train, root, "by-hand", 4, *BUDGET, f"--load={checkpoints}")
    pool(1).run(train, root, "warm", 4, *BUDGET, "--full-selector-warmup-iters=2")
    rows = metrics_of(root, "warm")
    assert [row["full_selector_warmup"] for row in rows] == [1, 1, 0, 0]
    assert [row["keep_ratio_asked"] for row in rows] == [1, 1, RATIO, RATIO]
    assert [row["num_kept_tokens"] == row["num_valid_tokens"] for row in rows] == [True, True, False, False]
    assert told(root, "warm", but=TIMES + PHASES) == told(root, "by-hand")
    assert same_weights(root, "warm", "by-hand")

    # In the carried scope the warm-up learns quantiles and cut, so that no step reads the batch twice.
    pool(1).run(train, root, "warm-carried", 4, *BUDGET, "--full-selector-warmup-iters=2", "--selection-scope=carried")
    carried = metrics_of(root, "warm-carried")
    assert [row["student_scoring_forwards"] for row in carried] == [0, 0, 0, 0]
    assert all(("carried_cut" in row, "kept_overlap/tip" in row) == (i > 1,) * 2 for i, row in enumerate(carried))
    for a, b in zip(carried[:3], rows[:3], strict=True):
        assert [a[key] for key in ("full_selector_warmup", "num_valid_tokens")] == [
            b[key] for key in ("full_selector_warmup", "num_valid_tokens")
        ]
        assert a["mean_D"] == pytest.approx(b["mean_D"], rel=1e-5)  # the weights of two steps before it, too
    assert carried[1]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert carried[2]["keep_ratio"] == pytest.approx(RATIO, abs=0.1)


LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2": (2, ()),
    "pp2-carried": (2, ("--pipeline-model-parallel-size=2", "--selection-scope=carried")),
    "cp2tp2sp": (4, ("--context-parallel-size=2", "--tensor-model-parallel-size=2", "--sequence-parallel")),
}


@pytest.fixture(scope="module")
def turning(pool, root: Path) -> tuple[list[str], list[bool]]:
    """Flags with which the fall-back comes and goes, and whether it then chooses each of five steps.

    The shares are those of a run that does not learn; its threshold lies between them.
    """
    pool(1).run(train, root, "still", 5, *BUDGET, "--lr=0")
    rows = metrics_of(root, "still")
    shares = [row["teacher_top5_share"] for row in rows]
    threshold = sum(sorted(shares)[2:4]) / 2
    flags = [f"--fallback-threshold={threshold!r}", "--fallback-low-c-share=1", "--lr=1e-7"]
    chosen = [False, *(share >= threshold for share in shares[:-1])]
    assert True in chosen and False in chosen[chosen.index(True) :], shares
    assert all(row["low_C_share"] < 1 for row in rows)
    return flags, chosen


@pytest.mark.parametrize("name", LAYOUTS)
def test_fallback_acts_on_the_shares_of_the_step_before(pool, root: Path, turning, name: str) -> None:
    flags, chosen = turning
    world_size, layout = LAYOUTS[name]
    pool(world_size).run(train, root, name, 5, *BUDGET, *layout, *flags, "--fallback-selector=full")
    rows = metrics_of(root, name)
    assert [row["fallback"] == 1 for row in rows] == chosen
    assert [row["keep_ratio_asked"] for row in rows] == [1 if full else RATIO for full in chosen]
    assert [row["num_kept_tokens"] == row["num_valid_tokens"] for row in rows] == chosen
    for row in rows:
        if row["fallback"]:  # the loss is the mean over all positions, as the statistics have it
            assert row["loss"] == pytest.approx(row["kl_reverse"], rel=1e-4)
    warned = [json.loads(line) for line in (root / name / "warnings.jsonl").read_text().splitlines()]
    messages = [line["message"] for line in warned if line["where"] == "training.phases"]
    turns = [step for step in range(1, 5) if chosen[step] != chosen[step - 1]]
    for step, message in zip(turns, messages, strict=True):
        assert message.startswith(f"iteration {step + 1}: ")
        assert ("--fallback-selector full chooses the positions" in message) == chosen[step]
        assert ("--selector teachability_entropy chooses the positions again" in message) != chosen[step]
        assert f"{rows[step - 1]['teacher_top5_share']:.2%} of the sampled tokens" in message


def straight_and_resumed(root: Path, name: str, flags: list[str]) -> None:
    """Runs in every rank."""
    train(root, f"{name}-straight", 5, *flags)
    checkpoints = root / f"{name}-resumed" / "checkpoints"
    train(root, f"{name}-resumed", 3, *flags, f"--save={checkpoints}")
    train(root, f"{name}-resumed", 5, *flags, f"--save={checkpoints}", f"--load={checkpoints}")


def test_resumed_runs_go_on_alike(pool, root: Path, turning) -> None:
    """Stopped while the fall-back, which carries quantiles of its own, has seen some of the steps it waits for."""
    flags = [
        *BUDGET,
        *("--selection-scope=carried", "--pipeline-model-parallel-size=2", "--full-selector-warmup-iters=1"),
        *("--fallback-selector=entropy", "--fallback-patience=2", "--fallback-threshold=1"),
    ]
    shares = [row["low_C_share"] for row in metrics_of(root, "still")]
    threshold = min(shares[:2])
    by_hand = Fallback.from_config(
        PhaseConfig(fallback_selector="entropy", fallback_patience=2, fallback_low_c_share=threshold)
    )
    wanted = []
    for step, share in enumerate(shares):
        wanted.append((float(step == 0), float(step > 0 and by_hand.active)))
        by_hand.see(top5_share=0, low_c_share=share)
        if step == 2:
            assert by_hand.active or by_hand.streak
    assert (0, 1) in wanted
    flags += ["--lr=1e-7", f"--fallback-low-c-share={threshold!r}"]
    pool(2).run(straight_and_resumed, root, "turn", flags)
    straight = metrics_of(root, "turn-straight")
    assert [(row["full_selector_warmup"], row["fallback"]) for row in straight] == wanted
    assert [row["student_scoring_forwards"] for row in straight] == [0] * 5
    assert told(root, "turn-resumed") == told(root, "turn-straight")
    assert same_weights(root, "turn-straight", "turn-resumed")
