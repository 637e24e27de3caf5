"""Figures of a batch: by hand, with values that are not finite, and under any spread over ranks."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_taopd.teachability import SelectionConfig, select
from megatron_taopd.teachability.figures import batch_figures
from megatron_taopd.teachability.overlap import agreement, overlaps
from tests.teachability.test_selection import random_batch, statistics, take


def figures_of(batch, keep: torch.Tensor, tokens: torch.Tensor, group=None, **options) -> dict[str, float]:
    stats, _, positions = batch
    return batch_figures(
        stats,
        keep_R=keep,
        position_R=positions,
        token_ids_R=tokens,
        group=group,
        **{"stop_ids": (2, 7), "entropy_support": "full", **options},
    )


def test_by_hand() -> None:
    """Medians of five rows: D 2, H 3. Rows lie in Q4, Q2, Q1, Q3 and, at the medians themselves, Q1."""
    stats = statistics([1, 1.5, 4, 3, 2], [0.0, 0.25, 0.5, 0.75, 1.0], [1, 4, 5, 2, 3])
    stats.teacher_logprob[:] = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
    positions = torch.tensor([15, 16, 63, 64, 5000])
    keep = torch.tensor([True, False, True, False, False])
    got = figures_of((stats, None, positions), keep, torch.tensor([2, 3, 7, 9, 8]))
    assert got == pytest.approx(
        {
            **{"D_q05": 1.1, "D_q25": 1.5, "D_q50": 2, "D_q75": 3, "D_q95": 3.8},
            **{"C_q05": 0.05, "C_q25": 0.25, "C_q50": 0.5, "C_q75": 0.75, "C_q95": 0.95},
            **{"H_q05": 1.2, "H_q25": 2, "H_q50": 3, "H_q75": 4, "H_q95": 4.8},
            "log_C_q05": math.log(0.05),
            **{f"quadrant_share/{q}": share for q, share in (("Q1", 0.4), ("Q2", 0.2), ("Q3", 0.2), ("Q4", 0.2))},
            **{f"quadrant_keep_ratio/{q}": ratio for q, ratio in (("Q1", 0.5), ("Q2", 0), ("Q3", 0), ("Q4", 1))},
            "keep_ratio_by_position/0-15": 1,
            "keep_ratio_by_position/16-63": 0.5,
            "keep_ratio_by_position/64-255": 0,
            "keep_ratio_by_position/4096+": 0,
            "stop_token_share": 0.4,
            "stop_token_keep_ratio": 1,
            "stop_token_teacher_logprob": -2.5,
        }
    )


def test_what_is_nowhere_is_left_out() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    got = figures_of((statistics([], [], []), None, nothing), nothing.bool(), nothing)
    assert got == {**{f"quadrant_share/Q{n}": 0 for n in (1, 2, 3, 4)}, "stop_token_share": 0}
    stats = statistics([math.nan, math.inf, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, math.nan])
    got = figures_of((stats, None, torch.arange(3)), torch.ones(3).bool(), torch.arange(3) + 20)
    assert (got["D_q05"], got["log_C_q05"]) == (1, pytest.approx(math.log(1e-30)))  # and no minus infinity
    assert (got["quadrant_share/Q2"], got["quadrant_share/Q3"]) == pytest.approx((2 / 3, 1 / 3))
    assert "quadrant_keep_ratio/Q1" not in got and "stop_token_keep_ratio" not in got
    assert all(math.isfinite(value) for value in got.values())


def test_entropy_may_be_that_of_the_top_k() -> None:
    stats = statistics([1, 2, 3], [0.5] * 3, [1, 2, 3], H_topk=[0.1, 0.2, 0.3])
    got = figures_of((stats, None, torch.arange(3)), torch.ones(3).bool(), torch.arange(3), entropy_support="topk")
    assert got["H_q50"] == pytest.approx(0.2)


def spread(batch) -> tuple[dict[str, float], dict[str, float]]:
    """Figures and overlaps of this rank's rows; responses are torn."""
    stats, samples, positions = batch
    group = torch.distributed.group.WORLD
    mine = (samples + positions) % group.size() == group.rank()
    part = (take(stats, mine), samples[mine], positions[mine])
    keep, tokens = part[2] % 3 == 0, part[1] * 5 % 11
    found = overlaps(
        part[0],
        keep,
        ["tip", "random", "prefix"],
        sample_index_R=part[1],
        position_R=part[2],
        config=SelectionConfig(keep_ratio=0.2, compatibility_scale="raw"),
        group=group,
        sample_group=group,
        seed=2,
        step=5,
    )
    return figures_of(part, keep, tokens, group), found


def test_spread_changes_nothing(pool) -> None:
    batch = random_batch(ties=True)
    ((figures, found),) = pool(1).run(spread, batch)
    for other, other_found in pool(3).run(spread, batch):
        assert other_found == found
        assert other.keys() == figures.keys()
        assert other == pytest.approx(figures, rel=1e-12)
    stats, samples, positions = batch
    asked = SelectionConfig(selector="tip", keep_ratio=0.2)
    tip = select(stats, sample_index_R=samples, position_R=positions, config=asked).keep.tolist()
    mine = (positions % 3 == 0).tolist()
    both = sum(a and b for a, b in zip(mine, tip, strict=True))
    assert found["tip"] == pytest.approx(2 * both / (sum(mine) + sum(tip)))


def test_agreement_of_masks() -> None:
    a, b = torch.tensor([1, 1, 0, 0, 0]).bool(), torch.tensor([0, 1, 1, 1, 0]).bool()
    assert agreement(a, b, None) == 2 * 1 / 5 and agreement(a, a, None) == 1 and agreement(a & ~a, b & ~b, None) == 1


def test_a_token_that_is_not_among_few_candidates_is_not_in_the_top_five() -> None:
    stats = statistics([1, 2, 3, 4], [0.5] * 4, [1] * 4)
    stats.rank_in_teacher[:] = torch.tensor([0, 2, 3, 3])  # 3 is K: not among them
    place = {"sample_index_R": torch.zeros(4, dtype=torch.int64), "position_R": torch.arange(4)}
    assert select(stats, config=SelectionConfig(support_k=3), **place).summary["teacher_top5_share"] == 0.5
    assert select(stats, config=SelectionConfig(support_k=16), **place).summary["teacher_top5_share"] == 1
