"""Selection equals a plain-Python reference for every selector, and does not depend on how responses are
spread."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch

from megatron_taopd.errors import ConfigError
from megatron_taopd.teachability import (
    SELECTORS,
    Ranking,
    ScoredPositions,
    Selection,
    SelectionConfig,
    TokenStatistics,
    select,
)
from megatron_taopd.teachability.hashing import uniform_hash
from megatron_taopd.teachability.scores import normalise
from megatron_taopd.teachability.selection import keep_budget
from megatron_taopd.testing import WorkerPool


def statistics(D, C, H, **others) -> TokenStatistics:
    """Statistics with the given columns and harmless others."""
    n = len(D)
    columns = {f.name: torch.zeros(n) for f in fields(TokenStatistics)}
    columns["rank_in_teacher"] = torch.zeros(n, dtype=torch.int64)
    given = {"D": D, "C": C, "H": H, **others}
    columns.update({name: torch.as_tensor(v, dtype=torch.float32) for name, v in given.items()})
    return TokenStatistics(**columns)


def take(stats: TokenStatistics, rows: torch.Tensor) -> TokenStatistics:
    return TokenStatistics(**{f.name: getattr(stats, f.name)[rows] for f in fields(TokenStatistics)})


def random_batch(ties: bool) -> tuple[TokenStatistics, torch.Tensor, torch.Tensor]:
    """Responses of 1 to 40 positions with sparse sample numbers; with ``ties`` few distinct values and some
    NaN."""
    generator = np.random.default_rng(7)
    lengths = generator.integers(1, 40, 13)
    samples = np.repeat(np.arange(13) * 3 + 1, lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    n = len(samples)
    d, c, h, h_topk = (
        generator.exponential(1, n),
        generator.beta(4, 1, n),
        generator.random(n) * 3,
        generator.random(n),
    )
    if ties:
        d, c, h = d.round(), c.round(1), h.round()
        d[5], c[9], h[11], d[20] = math.nan, math.nan, math.inf, math.inf
    return statistics(d, c, h, H_topk=h_topk), torch.tensor(samples), torch.tensor(positions)


def scaled(values: list[float]) -> list[float]:
    finite = [v for v in values if math.isfinite(v)]
    low, high = np.quantile(finite, [0.05, 0.95])
    if high - low < 1e-12:
        return [0.0] * len(values)
    return [min(max((v - low) / (high - low), 0.0), 1.0) if math.isfinite(v) else 0.0 for v in values]


def reference_keep(
    stats: TokenStatistics, samples: list[int], positions: list[int], config: SelectionConfig
) -> list[bool]:
    """Keep mask by sorting Python tuples, from METHOD's table."""
    D, C, H = (getattr(stats, name).double().tolist() for name in ("D", "C", "H"))
    if config.entropy_support == "topk":
        H = stats.H_topk.double().tolist()
    d, c, h = scaled(D), scaled(C), scaled(H)
    raw = config.compatibility_scale == "raw"
    w = [v if math.isfinite(v) else 0.0 for v in C] if raw else c
    upstream = config.support_mode == "upstream"
    rows = range(len(D))

    def soft_or(a: float, b: float) -> float:
        return 1 - (1 - a) * (1 - b)

    if config.selector == "teachability":
        score, lead = [d[i] * w[i] for i in rows], D
    elif config.selector == "teachability_entropy":
        product = scaled([D[i] * C[i] for i in rows]) if upstream else [d[i] * w[i] for i in rows]
        score, lead = [soft_or(h[i], product[i]) for i in rows], D
    elif config.selector == "incompatible":
        score, lead = [d[i] * (1 - w[i]) for i in rows], D
    elif config.selector == "entropy":
        score, lead = h, H
    elif config.selector == "divergence":
        score, lead = d, D
    elif config.selector == "compatibility":
        score, lead = w, C
    elif config.selector == "tip":
        score, lead = [soft_or(h[i], d[i]) for i in rows], D
    elif config.selector == "q3_teachability":
        mid_h, mid_d = np.median(h), np.median(d)
        score = [d[i] * w[i] if h[i] < mid_h and d[i] >= mid_d else -1.0 for i in rows]
        lead = D
    elif config.selector == "prefix":
        score, lead = [-p for p in positions], [0.0] * len(D)
    elif config.selector == "full":
        return [True] * len(D)
    else:
        raise KeyError(config.selector)
    lead = [v if math.isfinite(v) else -math.inf for v in lead]
    if upstream:
        order = sorted(rows, key=lambda i: (-score[i], positions[i], samples[i]))
    else:
        order = sorted(rows, key=lambda i: (-score[i], -lead[i], samples[i], positions[i]))
    budget = math.ceil((config.keep_ratio or 0.1) * len(D))
    keep = [False] * len(D)
    for i in order[:budget]:
        keep[i] = True
    minimum = 1 if config.min_keep_per_sample is None else config.min_keep_per_sample
    for sample in set(samples):
        own = [i for i in order if samples[i] == sample]
        for i in own:
            if sum(keep[j] for j in own) < min(minimum, len(own)):
                keep[i] = True
    return keep


CONFIGS = [
    *(SelectionConfig(selector=name) for name in SELECTORS if name not in ("random",)),
    *(SelectionConfig(selector=name, support_mode="upstream") for name in SELECTORS if name != "random"),
    SelectionConfig(compatibility_scale="raw"),
    SelectionConfig(selector="teachability_entropy", compatibility_scale="raw"),
    SelectionConfig(selector="incompatible", compatibility_scale="raw", keep_ratio=0.03),
    SelectionConfig(selector="compatibility", compatibility_scale="raw", min_keep_per_sample=0),
    SelectionConfig(selector="q3_teachability", keep_ratio=0.6),
    SelectionConfig(selector="entropy", entropy_support="topk", keep_ratio=0.25),
    SelectionConfig(keep_ratio=1.0),
    SelectionConfig(keep_ratio=0.001, min_keep_per_sample=3),
    SelectionConfig(keep_ratio=0.01, min_keep_per_sample=0),
]


def select_spread(
    batch, configs: list[SelectionConfig], seed: int, row_by_row: bool = False
) -> list[tuple[torch.Tensor, Selection]]:
    """Selection of this rank's responses under a spread drawn from the seed, rows in shuffled order.

    Args:
        row_by_row: responses are torn: each row has an owner of its own, and the last rank has none.
    """
    stats, samples, positions = batch
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(samples), generator=generator)
    if group is not None and group.size() > 1:
        if row_by_row:
            owner = torch.randint(0, group.size() - 1, (len(samples),), generator=generator)[order]
        else:
            owner = torch.randint(0, group.size(), (int(samples.max()) + 1,), generator=generator)[samples[order]]
        order = order[owner == group.rank()]
    return [
        (
            order,
            select(
                take(stats, order),
                sample_index_R=samples[order],
                position_R=positions[order],
                config=config,
                group=group,
                sample_group=group if row_by_row else None,
                seed=11,
                step=4,
            ),
        )
        for config in configs
    ]


def joined(per_rank: list[tuple[torch.Tensor, Selection]], name: str) -> torch.Tensor:
    order = torch.cat([rows for rows, _ in per_rank])
    values = torch.cat([getattr(s, name) for _, s in per_rank])
    return torch.empty_like(values).scatter_(0, order, values)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_selector_equals_the_reference_under_any_spread(
    pool: Callable[[int], WorkerPool], ranks: int, ties: bool
) -> None:
    batch = random_batch(ties)
    samples, positions = batch[1].tolist(), batch[2].tolist()
    answers = pool(ranks).run(select_spread, batch, CONFIGS, ranks)
    for index, config in enumerate(CONFIGS):
        per_rank = [answer[index] for answer in answers]
        keep = joined(per_rank, "keep").tolist()
        want = reference_keep(batch[0], samples, positions, config)
        assert keep == want, config
        summary = per_rank[0][1].summary
        assert summary["num_kept"] == sum(want)
        assert summary["num_valid"] == len(want)
        assert all(s.summary == summary for _, s in per_rank)


def test_responses_may_be_torn(pool: Callable[[int], WorkerPool]) -> None:
    """As under context parallelism: the positions that every response keeps at least are found over the ranks."""
    batch = random_batch(ties=True)
    samples, positions = batch[1].tolist(), batch[2].tolist()
    configs = [SelectionConfig(keep_ratio=0.02, min_keep_per_sample=minimum) for minimum in (0, 1, 2, 5)]
    answers = pool(4).run(select_spread, batch, configs, 3, True)
    for index, config in enumerate(configs):
        keep = joined([answer[index] for answer in answers], "keep").tolist()
        assert keep == reference_keep(batch[0], samples, positions, config), config


@pytest.mark.parametrize("ranks", [2, 3])
def test_spread_changes_no_bit(pool: Callable[[int], WorkerPool], ranks: int) -> None:
    batch = random_batch(ties=True)
    configs = [SelectionConfig(), SelectionConfig(selector="random"), SelectionConfig(selector="tip")]
    alone = select_spread(batch, configs, 0)
    answers = pool(ranks).run(select_spread, batch, configs, 5)
    for index in range(len(configs)):
        for name in ("D_norm", "C_norm", "H_norm", "score", "keep"):
            spread = joined([answer[index] for answer in answers], name)
            assert torch.equal(spread, joined([alone[index]], name)), (configs[index].selector, name)
        assert answers[0][index][1].summary == alone[index][1].summary


def keep_of(stats: TokenStatistics, samples: list[int], positions: list[int], **options) -> list[int]:
    """Kept rows; ``min_keep_per_sample`` 0 unless said otherwise."""
    selection = select(
        stats,
        sample_index_R=torch.tensor(samples),
        position_R=torch.tensor(positions),
        config=SelectionConfig(**{"min_keep_per_sample": 0, **options}),
    )
    return selection.keep.nonzero()[:, 0].tolist()


def test_quantile_scaling_by_hand() -> None:
    """0..20: q05 = 1 and q95 = 19, so that 10 becomes a half and both ends are clipped."""
    stats = statistics(range(21), [0.5] * 21, [0.0] * 20 + [math.nan])
    selection = select(
        stats,
        sample_index_R=torch.zeros(21, dtype=torch.int64),
        position_R=torch.arange(21),
        config=SelectionConfig(),
    )
    assert selection.D_norm[[0, 1, 10, 19, 20]].tolist() == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0])
    assert selection.C_norm.tolist() == [0.0] * 21  # no spread
    assert selection.H_norm.tolist() == [0.0] * 21
    assert (selection.summary["D_q05"], selection.summary["D_q95"]) == pytest.approx((1.0, 19.0))


def test_scores_by_hand() -> None:
    """Three rows with D~ = (0, .5, 1), C~ = (1, .5, 0), H~ = (.5, 0, 1)."""
    # With three values q05 and q95 lie a tenth inside the ends: x~ of the middle is a half, ends clip to 0
    # and 1.
    stats = statistics([0, 1, 2], [0.8, 0.5, 0.2], [1, 0, 2])
    want = {
        "teachability": [0, 0.25, 0],
        "teachability_entropy": [0.5, 0.25, 1],
        "incompatible": [0, 0.25, 1],
        "entropy": [0.5, 0, 1],
        "divergence": [0, 0.5, 1],
        "compatibility": [1, 0.5, 0],
        "tip": [0.5, 0.5, 1],
        "q3_teachability": [-1, 0.25, -1],
        "prefix": [0, -1, -2],
    }
    for selector, score in want.items():
        got = select(
            stats,
            sample_index_R=torch.zeros(3, dtype=torch.int64),
            position_R=torch.arange(3),
            config=SelectionConfig(selector=selector),
        ).score
        assert got.tolist() == pytest.approx(score, abs=1e-6), selector
    raw = select(
        stats,
        sample_index_R=torch.zeros(3, dtype=torch.int64),
        position_R=torch.arange(3),
        config=SelectionConfig(compatibility_scale="raw"),
    )
    assert raw.score.tolist() == pytest.approx([0, 0.25, 0.2])
    assert raw.C_norm.tolist() == pytest.approx([1, 0.5, 0], abs=1e-6)


def test_ties_go_to_the_raw_quantity_then_sample_then_position() -> None:
    """D~ clips to 1 above q95 = 5, where D still differs; equal D go by sample, then by position."""
    d = [0.0] * 17 + [5.0, 5.0, 5.0, 6.0]
    samples = [0] * 17 + [2, 1, 1, 3]
    positions = [*range(17), 0, 1, 0, 0]
    stats = statistics(d, [0.5] * 21, [0.0] * 21)
    common = {"selector": "divergence"}
    one, two, three = ({"keep_ratio": n / 21 - 0.001, **common} for n in (1, 2, 3))
    assert keep_of(stats, samples, positions, **one) == [20]
    assert keep_of(stats, samples, positions, **two) == [19, 20]
    assert keep_of(stats, samples, positions, **three) == [18, 19, 20]
    # The release goes by position alone: positions 0 of samples 1, 2 and 3 come before position 1 of sample
    # 1.
    assert keep_of(stats, samples, positions, support_mode="upstream", **one) == [19]
    assert keep_of(stats, samples, positions, support_mode="upstream", **three) == [17, 19, 20]


def test_min_keep_adds_each_responses_own_best() -> None:
    stats = statistics([9, 8, 7, 6, 1, 2, 3, 0], [0.5] * 8, [0.0] * 8)
    samples, positions = [0, 0, 0, 0, 1, 1, 1, 2], [0, 1, 2, 3, 0, 1, 2, 0]
    common = {"selector": "divergence", "keep_ratio": 0.25}
    assert keep_of(stats, samples, positions, **common) == [0, 1]
    assert keep_of(stats, samples, positions, min_keep_per_sample=1, **common) == [0, 1, 6, 7]
    assert keep_of(stats, samples, positions, min_keep_per_sample=2, **common) == [0, 1, 5, 6, 7]


def test_low_share_and_threshold_are_told() -> None:
    stats = statistics([0.0, 0.05, 3.0, 4.0], [0.4, 0.6, 0.9, 0.1], [0.0] * 4)
    stats.rank_in_teacher[:] = torch.tensor([0, 4, 5, 16])
    summary = select(
        stats,
        sample_index_R=torch.arange(4),
        position_R=torch.zeros(4, dtype=torch.int64),
        config=SelectionConfig(selector="divergence", keep_ratio=0.5, min_keep_per_sample=0),
    ).summary
    assert (summary["low_C_share"], summary["low_D_share"], summary["teacher_top5_share"]) == (0.5, 0.5, 0.5)
    assert (summary["num_budget"], summary["num_kept"], summary["keep_ratio"]) == (2.0, 2.0, 0.5)
    assert summary["threshold"] == pytest.approx((3.0 - summary["D_q05"]) / (summary["D_q95"] - summary["D_q05"]))


@pytest.mark.parametrize(
    ("ratio", "valid", "budget"),
    [
        (0.1, 100, 10),
        (0.1, 101, 11),
        (0.07, 100, 7),
        (0.001, 5, 1),
        (1.0, 7, 7),
        (0.1, 0, 0),
        (1e-5, 10**6, 10),
    ],
)
def test_budget_rounds_up_the_written_ratio(ratio: float, valid: int, budget: int) -> None:
    assert keep_budget(ratio, valid) == budget


def test_no_rows_anywhere() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for selector in SELECTORS:
        selection = select(
            statistics([], [], []),
            sample_index_R=none,
            position_R=none,
            config=SelectionConfig(selector=selector),
        )
        assert selection.keep.numel() == 0 and selection.summary["num_kept"] == 0


def test_random_is_uniform_and_tied_to_its_counters() -> None:
    samples, positions = torch.arange(200).repeat_interleave(50), torch.arange(50).repeat(200)
    first = uniform_hash(1, 0, samples, positions)
    assert torch.equal(first[7:9], uniform_hash(1, 0, samples[7:9], positions[7:9]))
    for other in (uniform_hash(2, 0, samples, positions), uniform_hash(1, 1, samples, positions)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.03
    histogram = torch.histc(first, 10, 0, 1)
    assert (histogram - 1000).abs().max() < 150 and len(first.unique()) == len(first)
    assert 0 <= first.min() and first.max() < 1


def test_random_by_published_values() -> None:
    """SplitMix64 seeded with 0 starts with 0xE220A8397B1DCDAF."""
    from megatron_taopd.teachability.hashing import _GOLDEN, _mix, _signed

    assert _mix(torch.tensor(_signed(_GOLDEN))).item() == _signed(0xE220A8397B1DCDAF)


def test_normalise_without_finite_values() -> None:
    assert normalise(torch.tensor([math.nan, math.inf]), math.nan, math.nan).tolist() == [0.0, 0.0]


def latest(rows: ScoredPositions) -> Ranking:
    return Ranking(score=rows.position.double())


def test_own_selector_by_path() -> None:
    stats = statistics([0.0] * 4, [0.5] * 4, [0.0] * 4)
    name = "tests.teachability.test_selection:latest"
    assert keep_of(stats, [0] * 4, [0, 1, 2, 3], selector=name, keep_ratio=0.5) == [2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector": "teachabilty"}, "unknown selector 'teachabilty'; did you mean 'teachability'"),
        ({"selector": "tests.nowhere:x"}, "selector 'tests.nowhere:x' cannot be imported"),
        ({"selector": "tests.naive:math"}, "is a module, not a function"),
        ({"keep_ratio": 0.0}, r"--keep-ratio 0.0 must be in \(0, 1\]"),
        ({"keep_ratio": 1.01}, r"--keep-ratio 1.01 must be in \(0, 1\]"),
        ({"keep_ratio": math.nan}, r"--keep-ratio nan must be in \(0, 1\]"),
        ({"support_k": 0}, "--support-k 0 must be at least 1"),
        ({"min_keep_per_sample": -1}, "--min-keep-per-sample -1"),
        ({"selector": "full", "keep_ratio": 0.5}, "--keep-ratio 0.5 has no effect with --selector full"),
        ({"selector": "full", "min_keep_per_sample": 2}, "--min-keep-per-sample 2 has no effect"),
        ({"selector": "entropy", "compatibility_scale": "raw"}, "--compatibility-scale raw has no effect"),
    ],
)
def test_bad_configuration(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SelectionConfig(**options)
