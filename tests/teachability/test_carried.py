"""Carried selection: it orders rows as the global one does, meets the budget in the mean, and depends on no spread."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_taopd.errors import ConfigError
from megatron_taopd.teachability import (
    CarriedEstimate,
    Ranking,
    ScoredPositions,
    SelectionConfig,
    TokenStatistics,
    select,
)
from megatron_taopd.teachability.carried import (
    cut_value,
    keep_by_estimate,
    keep_without_statistics,
    select_by_estimate,
    update_estimate,
)
from megatron_taopd.teachability.overlap import agreement
from megatron_taopd.teachability.ranking import RankedRows
from megatron_taopd.teachability.selectors import READS_NO_STATISTICS, SELECTORS
from megatron_taopd.testing import WorkerPool
from tests.teachability.test_selection import random_batch, statistics, take

CARRIED = sorted(set(SELECTORS) - READS_NO_STATISTICS)


def carried(**options) -> SelectionConfig:
    return SelectionConfig(**{"selection_scope": "carried", "min_keep_per_sample": 0, **options})


def draw(generator: torch.Generator, rows: int = 4000) -> tuple[TokenStatistics, torch.Tensor, torch.Tensor]:
    """A batch from one fixed distribution, with D, C and H as skewed as real ones."""
    d = torch.rand(rows, generator=generator).log().neg() ** 2
    c = torch.rand(rows, generator=generator) ** 0.2
    h = torch.rand(rows, generator=generator) ** 3 * 4
    return statistics(d, c, h), torch.arange(rows) // 100, torch.arange(rows) % 100


def update(before: CarriedEstimate | None, batch, config: SelectionConfig, group=None) -> CarriedEstimate:
    stats, samples, positions = batch
    return update_estimate(
        before, stats, sample_index_R=samples, position_R=positions, config=config, group=group, seed=3, step=1
    )


def keep(estimate: CarriedEstimate, batch, config: SelectionConfig, step: int = 1) -> torch.Tensor:
    stats, samples, positions = batch
    return keep_by_estimate(
        estimate, stats, sample_index_R=samples, position_R=positions, config=config, seed=3, step=step
    )[1]


def globally(batch, config: SelectionConfig) -> torch.Tensor:
    stats, samples, positions = batch
    return select(stats, sample_index_R=samples, position_R=positions, config=config, seed=3, step=1).keep


def test_cut_value_orders_by_score_then_by_the_tie_break() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.tensor([-3.0, -1.0, 0.0, 0.25, 0.5, 1.0, 1.5, 7.0], dtype=torch.float64)
    score = score[torch.randint(8, (500,), generator=generator)]
    lead = torch.randint(-3, 50, (500,), generator=generator).double() / 7
    none = torch.zeros(500)
    rows = RankedRows(D_norm=none, C_norm=none, H_norm=none, score=score, lead=lead, order_keys=[], bounds={})
    value = cut_value(rows)
    for i, j in torch.randint(500, (4000, 2), generator=generator).tolist():
        if score[i] != score[j]:
            assert (value[i] > value[j]) == (score[i] > score[j]), (score[i], score[j])
        elif score[i] in (-1.0, 0.0, 1.0):
            assert (value[i] > value[j]) == (lead[i] > lead[j])
        else:
            assert value[i] == value[j]
    assert (cut_value(RankedRows(**{**vars(rows), "lead": None}))[score == 1] == 1).all()


@pytest.mark.parametrize("mode", ["exact", "upstream"])
@pytest.mark.parametrize("selector", CARRIED)
def test_a_batch_cuts_itself_as_global_does(selector: str, mode: str) -> None:
    """An estimate taken from a batch alone, on that batch: the same mask, unless the release's ties by position
    cross responses, where only the number agrees."""
    batch = draw(torch.Generator().manual_seed(1))
    for ratio in (0.003, 0.03, 0.1, 0.7):
        config = carried(selector=selector, keep_ratio=ratio, support_mode=mode)
        mine, exact = keep(update(None, batch, config), batch, config), globally(batch, config)
        if mode == "exact":
            assert torch.equal(mine, exact), ratio
        assert abs(int(mine.sum()) - int(exact.sum())) <= 40  # a tie is one position of 40 responses


@pytest.mark.parametrize("ratio", [0.02, 0.04, 0.06, 0.1, 0.3])
@pytest.mark.parametrize("selector", ["teachability", "divergence", "compatibility", "tip", "q3_teachability"])
def test_the_budget_is_met_on_average(selector: str, ratio: float) -> None:
    """Also near 5 %, where clipping makes a step in the score that a moving threshold alone would stumble over."""
    generator = torch.Generator().manual_seed(2)
    config = carried(selector=selector, keep_ratio=ratio)
    estimate = update(None, draw(generator), config)
    ratios, agreements = [], []
    for _ in range(30):
        batch = draw(generator)
        mine = keep(estimate, batch, config)
        ratios.append(float(mine.double().mean()))
        agreements.append(agreement(mine, globally(batch, config), None))
        estimate = update(estimate, batch, config)
    assert sum(ratios) / 30 == pytest.approx(ratio, rel=0.05)
    assert all(r == pytest.approx(ratio, rel=0.35) for r in ratios)
    assert sum(agreements) / 30 > 0.9


def test_rows_at_the_cut_are_kept_in_their_share() -> None:
    """Half of all rows share the highest score and tie-break: a bare threshold keeps all of them or none."""
    generator = torch.Generator().manual_seed(3)
    stats, samples, positions = draw(generator)
    stats.C[::2] = 1.0
    batch = (stats, samples, positions)
    config = carried(selector="compatibility", keep_ratio=0.1)
    estimate = update(update(None, batch, config), batch, config)
    kept = [int(keep(estimate, batch, config, step=step).sum()) for step in range(20)]
    assert sum(kept) / 20 == pytest.approx(400, rel=0.05)
    assert len(set(kept)) > 1


def test_moving_average_by_hand() -> None:
    """D from 0 to 20 has q05 = 1 and q95 = 19, from 20 to 40 has 21 and 39."""
    config = carried(selector="divergence", carried_decay=0.75, keep_ratio=0.5)
    samples, positions = torch.zeros(21, dtype=torch.int64), torch.arange(21)
    first = update(None, (statistics(range(21), [0.5] * 21, [0.0] * 21), samples, positions), config)
    assert first.quantiles[0][0] == pytest.approx([1, 19])
    assert first.cut == pytest.approx((10 - 1) / 18) and first.cut_share == 1
    second = update(first, (statistics(range(20, 41), [0.5] * 21, [0.0] * 21), samples, positions), config)
    assert second.quantiles[0][0] == pytest.approx([0.75 * 1 + 0.25 * 21, 0.75 * 19 + 0.25 * 39])
    # At the moved bounds 6 and 24 the batch's middle, 30, is clipped to 1 and its place lies on the tie-break.
    middle = 1.5 + torch.atan(torch.tensor(30.0, dtype=torch.float64)) / torch.pi
    assert second.cut == pytest.approx(0.75 * first.cut + 0.25 * float(middle))


def test_batches_without_finite_values_leave_the_estimate() -> None:
    config = carried()
    batch = draw(torch.Generator().manual_seed(4))
    estimate = update(None, batch, config)
    none = torch.zeros(0, dtype=torch.int64)
    assert update(estimate, (statistics([], [], []), none, none), config) == estimate
    empty = update(None, (statistics([], [], []), none, none), config)
    assert not keep(empty, batch, config).any()
    assert keep(empty, batch, carried(min_keep_per_sample=2)).sum() == 80
    assert update(empty, batch, config) == estimate


def test_micro_batches_are_judged_alone() -> None:
    """Whole responses in any grouping: the same rows are kept, with the best of each response."""
    stats, samples, positions = random_batch(ties=False)
    config = carried(keep_ratio=0.05, min_keep_per_sample=2)
    estimate = update(None, (stats, samples, positions), config)
    whole = keep(estimate, (stats, samples, positions), config)
    for sample in samples.unique():
        own = samples == sample
        part = keep(estimate, (take(stats, own), samples[own], positions[own]), config)
        assert torch.equal(part, whole[own])
        assert part.sum() >= min(2, int(own.sum()))


def spread(batch, configs: list[SelectionConfig]) -> list[tuple]:
    """Two updates and a selection over this rank's responses."""
    stats, samples, positions = batch
    group = torch.distributed.group.WORLD
    mine = samples % group.size() == group.rank()
    part = (take(stats, mine), samples[mine], positions[mine])
    answers = []
    for config in configs:
        estimate = update(update(None, part, config, group), part, config, group)
        selection = select_by_estimate(
            estimate,
            part[0],
            sample_index_R=part[1],
            position_R=part[2],
            config=config,
            group=group,
            seed=3,
            step=1,
        )
        by_place = keep_without_statistics(
            part[1], part[2], config=carried(selector="prefix"), group=group, seed=3, step=1
        )
        same = agreement(selection.keep, by_place, group)
        answers.append((mine, estimate, selection.keep, selection.summary, same))
    return answers


@pytest.mark.parametrize("ranks", [2, 3])
def test_spread_changes_no_bit(pool: Callable[[int], WorkerPool], ranks: int) -> None:
    batch = random_batch(ties=True)
    configs = [carried(selector=name, support_mode=mode) for name in CARRIED for mode in ("exact", "upstream")]
    alone = pool(1).run(spread, batch, configs)[0]
    answers = pool(ranks).run(spread, batch, configs)
    for index, config in enumerate(configs):
        _, estimate, wanted, summary, same = alone[index]
        got = torch.zeros_like(wanted)
        for mine, other, kept, other_summary, other_same in (answer[index] for answer in answers):
            assert (other, other_same) == (estimate, same), config
            assert {k: v for k, v in other_summary.items() if v == v} == {k: v for k, v in summary.items() if v == v}
            got[mine] = kept
        assert torch.equal(got, wanted), config


@pytest.mark.parametrize("selector", sorted(READS_NO_STATISTICS))
def test_selectors_of_places_alone_need_no_statistics(selector: str) -> None:
    batch = draw(torch.Generator().manual_seed(5))
    options = {} if selector == "full" else {"keep_ratio": 0.07, "min_keep_per_sample": 2}
    config = SelectionConfig(selector=selector, selection_scope="carried", **options)
    got = keep_without_statistics(batch[1], batch[2], config=config, group=None, seed=3, step=1)
    assert torch.equal(got, globally(batch, config))


def test_estimates_are_plain_and_selectors_own_questions_are_carried() -> None:
    batch = draw(torch.Generator().manual_seed(6))
    for selector, mode, questions in (
        ("teachability", "exact", 1),
        ("q3_teachability", "exact", 3),
        ("teachability_entropy", "upstream", 2),
    ):
        estimate = update(None, batch, carried(selector=selector, support_mode=mode))
        assert len(estimate.quantiles) == questions
        assert CarriedEstimate(**estimate.as_dict()) == estimate


def moody(rows: ScoredPositions) -> Ranking:
    """A selector that does not ask for the same quantiles each time."""
    score = rows.D_norm * (0.5 if rows.step % 2 else rows.median(rows.statistics.D))
    return Ranking(score=score, lead=rows.statistics.D)


def test_a_selector_that_changes_its_questions_is_refused() -> None:
    batch = draw(torch.Generator().manual_seed(7))
    config = carried(selector=f"{__name__}:moody")
    estimate = update(None, batch, config)
    keep(estimate, batch, config, step=1)
    with pytest.raises(ConfigError, match="question 2 is not among the 1 .* --selection-scope global"):
        keep(estimate, batch, config, step=2)


def test_agreement_is_common_rows_over_the_mean_number() -> None:
    a, b = torch.tensor([1, 1, 1, 0, 0]).bool(), torch.tensor([0, 1, 1, 1, 1]).bool()
    assert agreement(a, b, None) == pytest.approx(2 * 2 / 7)
    assert agreement(a, a, None) == 1 and agreement(a & ~a, a & ~a, None) == 1
