"""``--score-from rollout``: the hidden states of the generation select what a forward pass over the responses does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_taopd.data.batches import make_micro_batches
from megatron_taopd.data.records import Rollout
from tests.oracle.cases import make_pair
from tests.training.recording import Kept, merged, run_and_record

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "bf16": (1, ("--bf16",)),
    "dp2": (2, ()),
    "cp2": (2, ("--context-parallel-size=2",)),
    "cp2pp2-packed": (
        4,
        ("--context-parallel-size=2", "--pipeline-model-parallel-size=2", "--packed-sequences"),
    ),
    "tp2pp2sp": (
        4,
        ("--tensor-model-parallel-size=2", "--pipeline-model-parallel-size=2", "--sequence-parallel"),
    ),
}


CLOSE = {"bf16": (5e-2, 3e-2)}
"""Scores (absolute) and metrics (relative) agree so closely: to the rounding of the type. Without an entry 1e-3."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("score_from")
    make_pair(root, "qwen3", tied_student=True)
    prompts = [{"id": f"p{i}", "prompt_tokens": list(range(3, 4 + i * 2 % 7)) + [40 + i]} for i in range(16)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return root


def both_ways(root: Path, name: str) -> list[list[Kept]]:
    """Runs in every rank: one step each way, from the same weights and so on the same responses."""
    return [
        run_and_record(
            [
                "train",
                f"--student={root / 'student'}",
                f"--teacher={root / 'teacher'}",
                f"--prompt-data={root / 'prompts.jsonl'}",
                "--max-response-length=9",
                "--global-batch-size=8",
                "--micro-batch-size=2",
                "--train-iters=1",
                "--keep-ratio=0.2",
                "--selector=teachability_entropy",
                f"--score-from={how}",
                f"--log-dir={root / name / how}",
                *LAYOUTS[name][1],
            ]
        )
        for how in ("forward", "rollout")
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_select_the_same_positions_up_to_numerical_ties(pool, root: Path, name: str) -> None:
    of_scores, of_metrics = CLOSE.get(name, (1e-3, 1e-3))
    answers = pool(LAYOUTS[name][0]).run(both_ways, root, name)
    (forward,), (rollout,) = (merged([answer[way] for answer in answers]) for way in (0, 1))
    assert set(forward) == set(rollout) and len(forward) > 40
    cut = min(score for keep, score in forward.values() if keep)
    for place, (keep, score) in forward.items():
        assert rollout[place][1] == pytest.approx(score, abs=of_scores)
        if rollout[place][0] != keep:  # only where its score is the cut's, up to rounding
            assert score == pytest.approx(cut, abs=of_scores), place
    rows = [json.loads((root / name / how / "metrics.jsonl").read_text()) for how in ("forward", "rollout")]
    assert [row["student_scoring_forwards"] for row in rows] == [1, 0]
    for key in ("loss", "grad_norm", "mean_D", "mean_C", "mean_H", "kl_forward", "num_kept_tokens"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=of_metrics), key


def rollout_with_hidden(prompt: int, response: int, first: float) -> Rollout:
    rows = torch.arange(response)[:, None] * 0.1 + torch.full((response, 3), first)
    return Rollout(id="r", prompt_tokens=[5] * prompt, response_tokens=list(range(10, 10 + response)), hidden_TH=rows)


def test_rows_come_in_the_order_of_the_micro_batch() -> None:
    """Responses one after the other, each by position, although hidden states of a pass lie position by position."""
    rollouts = [rollout_with_hidden(2, 3, 1.0), rollout_with_hidden(4, 1, 2.0), rollout_with_hidden(1, 2, 3.0)]
    first, second = make_micro_batches(rollouts, micro_batch_size=2, sample_offset=0, device=torch.device("cpu"))
    assert first.student_hidden_RH is not None and second.student_hidden_RH is not None
    assert first.student_hidden_RH[:, 0].tolist() == pytest.approx([1.0, 1.1, 1.2, 2.0])
    assert first.token_ids_R.tolist() == [10, 11, 12, 10]
    assert second.student_hidden_RH[:, 0].tolist() == pytest.approx([3.0, 3.1])
    for rollout in rollouts:
        rollout.hidden_TH = None
    (bare,) = make_micro_batches(rollouts, micro_batch_size=3, sample_offset=0, device=torch.device("cpu"))
    assert bare.student_hidden_RH is None


def test_wrong_row_counts_are_a_bug_of_the_engine() -> None:
    rollout = rollout_with_hidden(2, 3, 1.0)
    rollout.response_tokens.append(7)
    with pytest.raises(AssertionError, match="3.*rows and the responses.*4"):
        make_micro_batches([rollout], micro_batch_size=1, sample_offset=0, device=torch.device("cpu"))
