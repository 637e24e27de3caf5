"""Token statistics at any vocabulary split equal brute force in float64."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from megatron_taopd.errors import ConfigError, DataError
from megatron_taopd.ops import HeadShard
from megatron_taopd.teachability import TokenStatistics, concat_statistics, token_statistics
from megatron_taopd.teachability.statistics import bytes_per_row
from megatron_taopd.testing import WorkerPool
from tests.naive import Problem, make_problem, statistics_row
from tests.needs import missing
from tests.traffic import Calls, counted_collectives, peak_live_bytes

NAMES = [f.name for f in fields(TokenStatistics)]


def shard(weight: torch.Tensor, vocab: int) -> HeadShard:
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    ranks, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    return HeadShard.for_rank(weight.chunk(ranks)[rank].clone(), vocab, group)


def compute(problem: Problem, chunk_rows: int = 3, **options) -> dict[str, torch.Tensor]:
    student = shard(problem.student_weight, problem.vocab)
    result = token_statistics(
        problem.student_hidden,
        problem.teacher_hidden,
        problem.tokens,
        student,
        shard(problem.teacher_weight, problem.vocab),
        logits_chunk_bytes=4 * student.weight.shape[0] * chunk_rows,
        **options,
    )
    return {name: getattr(result, name) for name in NAMES}


def expected(problem: Problem, k: int, temperature: float, mode: str) -> dict[str, torch.Tensor]:
    student, teacher = problem.logits(temperature)
    rows = [
        statistics_row(s, t, int(token), k, mode) for s, t, token in zip(student, teacher, problem.tokens, strict=True)
    ]
    columns = {name: [row[name] for row in rows] for name in NAMES}
    return {
        name: torch.tensor(column, dtype=torch.float64 if isinstance(column[0], float) else None)
        for name, column in columns.items()
    }


# name: rows, real vocabulary, padded, K, temperature, ties
CASES = {
    "padding": (7, 101, 120, 16, 1.0, False),
    "temperature": (7, 101, 120, 5, 0.6, False),
    "whole vocabulary": (4, 23, 24, 23, 1.3, False),
    "shards of padding alone": (3, 11, 48, 8, 1.0, False),
    "one row, K=1": (1, 37, 48, 1, 1.0, False),
    "ties": (9, 61, 72, 16, 1.0, True),
}


def all_cases(dtype: torch.dtype) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    results = {}
    for name, (rows, vocab, padded, k, temperature, ties) in CASES.items():
        for mode in ("exact", "upstream"):
            problem = make_problem(rows, vocab, padded=padded, ties=ties).to(dtype)
            results[name, mode] = compute(problem, k=k, temperature=temperature, support_mode=mode)
    return results


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_equal_brute_force(pool: Callable[[int], WorkerPool], ranks: int, dtype: torch.dtype, tolerance: float) -> None:
    per_rank = pool(ranks).run(all_cases, dtype)
    for name, (rows, vocab, padded, k, temperature, ties) in CASES.items():
        for mode in ("exact", "upstream"):
            problem = make_problem(rows, vocab, padded=padded, ties=ties).to(dtype)
            want = expected(problem, k, temperature, mode)
            for got in per_rank:
                for column in NAMES:
                    torch.testing.assert_close(
                        got[name, mode][column],
                        want[column],
                        rtol=tolerance,
                        atol=tolerance,
                        check_dtype=False,
                        msg=lambda text, at=f"{name}, {mode}, {column}": f"{at}: {text}",
                    )
            for column in NAMES:
                assert torch.equal(per_rank[0][name, mode][column], per_rank[-1][name, mode][column])


def in_tiles(problem: Problem, num_bytes: int) -> dict[str, torch.Tensor]:
    result = token_statistics(
        problem.student_hidden,
        problem.teacher_hidden,
        problem.tokens,
        shard(problem.student_weight, problem.vocab),
        shard(problem.teacher_weight, problem.vocab),
        k=16,
        logits_chunk_bytes=num_bytes,
    )
    return {name: getattr(result, name) for name in NAMES}


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_tiles_do_not_matter(pool: Callable[[int], WorkerPool], ranks: int, ties: bool) -> None:
    """Tiles of 32 and 96 ids, and of a row and of all rows, give what one tile gives."""
    problem = make_problem(9, 301, padded=312, ties=ties)
    want = expected(problem, 16, 1.0, "exact")
    for num_bytes in (4 * 32, 4 * 96, 4 * 9 * 64, 2**20):
        for got in pool(ranks).run(in_tiles, problem, num_bytes):
            for name in NAMES:
                torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-10, check_dtype=False, msg=name)


def test_compiled_passes_are_close(pool: Callable[[int], WorkerPool]) -> None:
    """One compiled loop adds up in fp32 in another order; ids and C come from the same code. The ranks find what this
    process has compiled."""
    if shutil.which("g++") is None:
        missing("no g++, the C++ compiler that torch.compile calls on CPU")
    problem = make_problem(9, 301, padded=312).to(torch.float32)
    plain = compute(problem, k=16)
    compiled = [compute(problem, k=16, compiled=True)]
    for result in [*compiled, *pool(2).run(compute, problem, k=16, compiled=True)]:
        for name, value in plain.items():
            torch.testing.assert_close(result[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_compiled_passes_without_a_compiler() -> None:
    import torch._inductor.config

    torch._dynamo.reset()  # what another test has compiled is not to be found
    options = {"cpp.cxx": ("/no/such/compiler",), "fx_graph_cache": False}
    with torch._inductor.config.patch(options), pytest.raises(ConfigError, match="--compile-statistics.*no/such"):
        compute(make_problem(3, 37, padded=48).to(torch.float32), k=4, compiled=True)
    torch._dynamo.reset()


def traffic(rows: int, k: int) -> Calls:
    """The collectives that the statistics of ``rows`` rows make."""
    problem = make_problem(rows, 101, padded=120).to(torch.float32)
    with counted_collectives() as calls:
        compute(problem, chunk_rows=4, k=k)
    return calls


@pytest.mark.parametrize(("ranks", "k"), [(2, 16), (4, 5)])
def test_one_collective_a_chunk_without_a_vocabulary_term(
    pool: Callable[[int], WorkerPool], ranks: int, k: int
) -> None:
    for calls in pool(ranks).run(traffic, 8, k):
        assert [name for name, _ in calls] == ["all_gather", "all_gather"]
        assert sum(size for _, size in calls) * (ranks - 1) == 8 * bytes_per_row(k, ranks)
    assert bytes_per_row(16, 2) == 424


def test_memory_does_not_grow_with_rows_times_vocabulary() -> None:
    """Live bytes at the peak, as torch's profiler counts them: tiles and per-row numbers only."""
    tile_bytes, vocab = 2**20, 20_000

    def peak(rows: int) -> int:
        problem = make_problem(rows, vocab, padded=vocab).to(torch.float32)
        return peak_live_bytes(lambda: in_tiles(problem, tile_bytes))

    small, large = peak(64), peak(512)
    assert 2 * tile_bytes < small < 2 * tile_bytes + 8 * 2**20
    assert large - small < 448 * 2_000  # bytes a row; a row of one model's logits has 80,000


def hand_problem() -> Problem:
    """Logits are the logs of the probabilities: p_s = (.5, .25, .125, .125), p_t = (.125, .5, .125, .25)."""
    student = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.125, 0.5, 0.125, 0.25]], dtype=torch.float64).log()
    eye = torch.eye(4, dtype=torch.float64)
    return Problem(student, teacher, eye, eye, torch.tensor([3]), torch.zeros(1), 4)


def test_by_hand() -> None:
    """K = 2: S = {0, 1}, T = {1, 3}, U = {0, 1, 3} with 1/8 of p_s and of p_t outside it."""
    got = {name: value.item() for name, value in compute(hand_problem(), k=2).items()}
    log2 = math.log(2)
    assert got["C"] == pytest.approx(0.125 + 0.5)
    assert got["C_topk"] == pytest.approx(0.5)
    # p_t/p_s on U is (1/4, 2, 2) with equal normalisers 7/8, and p_t on U is (1, 4, 2)/7.
    assert got["D"] == pytest.approx((-2 * 1 + 4 + 2) / 7 * log2)
    assert got["H"] == pytest.approx((0.5 + 0.25 * 2 + 0.25 * 3) * log2)
    assert got["H_topk"] == pytest.approx(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / log2)
    assert got["kl_forward"] == pytest.approx((-2 * 0.125 + 0.5 + 0.25) * log2)
    assert got["kl_reverse"] == pytest.approx((2 * 0.5 - 0.25 - 0.125) * log2)
    assert (got["student_logprob"], got["teacher_logprob"]) == pytest.approx((-3 * log2, -2 * log2))
    assert (got["overlap"], got["student_mass"], got["teacher_mass"]) == pytest.approx((0.5, 0.75, 0.75))
    assert (got["teacher_top1_in_student"], got["rank_in_student"], got["rank_in_teacher"]) == (True, 2, 1)


def test_upstream_by_hand() -> None:
    """Each side knows its own list: q_s ~ (1/2, 1/4, e) and q_t ~ (e, 1/2, 1/4), e = 1e-12."""
    got = compute(hand_problem(), k=2, support_mode="upstream")
    e = 1e-12
    terms = e * math.log(2 * e) + 0.5 * math.log(2) + 0.25 * math.log(0.25 / e)
    assert got["D"].item() == pytest.approx(terms / (0.75 + e), rel=1e-12)
    assert got["C"].item() == pytest.approx(0.5)


def test_equal_logits_go_to_the_lower_id() -> None:
    """Student logits 1 1 0 0 0: S = {0, 1, 2}. Teacher logits 0 1 1 1 1: T = {1, 2, 3}, in this order."""
    eye = torch.eye(5, dtype=torch.float64)
    student, teacher = eye[0:1] + eye[1:2], 1 - eye[0:1]
    problem = Problem(student, teacher, eye, eye, torch.tensor([3]), torch.zeros(1), 5)
    got = compute(problem, k=3)
    assert got["overlap"].item() == pytest.approx(2 / 3)
    assert (got["rank_in_student"].item(), got["rank_in_teacher"].item()) == (3, 2)


def test_exact_where_models_agree() -> None:
    """The same model twice, in fp32 with large logits: no divergence beyond rounding, all mass inside."""
    problem = make_problem(6, 50, padded=50)
    problem = Problem(
        10 * problem.student_hidden,
        10 * problem.student_hidden,
        problem.student_weight,
        problem.student_weight,
        problem.tokens,
        problem.old_logprobs,
        50,
    ).to(torch.float32)
    got = compute(problem, k=50)
    for name in ("D", "kl_forward", "kl_reverse"):
        assert 0 <= got[name].min() and got[name].max() < 1e-12, name
    assert (got["C"] <= 1).all() and (got["C"] > 1 - 1e-6).all()


def empty() -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    problem = make_problem(0, 50, padded=60).to(torch.float32)
    return [(name, tuple(value.shape), value.dtype) for name, value in compute(problem, k=4).items()]


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_rows(pool: Callable[[int], WorkerPool], ranks: int) -> None:
    for answer in pool(ranks).run(empty):
        shapes = {name: shape for name, shape, _ in answer}
        assert shapes == {name: (0,) for name in NAMES}
        assert dict((n, d) for n, _, d in answer)["rank_in_student"] == torch.int64


def test_concat_keeps_order() -> None:
    problem = make_problem(5, 50, padded=50)
    whole = compute(problem, k=4)
    parts = []
    for rows in (slice(0, 2), slice(2, 2), slice(2, 5)):
        part = Problem(
            problem.student_hidden[rows],
            problem.teacher_hidden[rows],
            problem.student_weight,
            problem.teacher_weight,
            problem.tokens[rows],
            problem.old_logprobs[rows],
            50,
        )
        parts.append(TokenStatistics(**compute(part, k=4)))
    joined = concat_statistics(parts)
    assert len(joined) == 5
    for name in NAMES:
        torch.testing.assert_close(getattr(joined, name), whole[name])


def test_bad_input_is_named() -> None:
    problem = make_problem(3, 20, padded=24)
    with pytest.raises(ConfigError, match="--support-k 21 must be between 1 and the vocabulary size 20"):
        compute(problem, k=21)
    with pytest.raises(ConfigError, match="temperature 0"):
        compute(problem, k=4, temperature=0)
    problem.tokens[1] = 20
    with pytest.raises(DataError, match=r"token id 20 \(row 1\) is outside the 20 ids"):
        compute(problem, k=4)
