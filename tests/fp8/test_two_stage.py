"""Statistics in two stages: their definition in float64 at TP 1 and 2, and how near they come to the exact ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from megatron_taopd.ops import HeadShard
from megatron_taopd.ops.fp8 import Fp8Head
from megatron_taopd.teachability import TokenStatistics, token_statistics
from megatron_taopd.teachability.softmax_sums import combine_sums
from megatron_taopd.teachability.two_stage import replace_in_sums
from megatron_taopd.testing import WorkerPool
from tests.fp8.test_head import rough_logits
from tests.naive import Problem, make_problem, statistics_row, top_ids
from tests.needs import FP8_DEVICES

NAMES = [f.name for f in fields(TokenStatistics)]
TEMPERATURE = 0.8
# name: rows, real vocabulary, padded, K, ties
CASES = {
    "padding": (7, 301, 320, 8, False),
    "2K is all there is": (5, 23, 32, 16, False),
    "a shard of padding alone": (3, 27, 64, 4, False),
    "ties": (6, 121, 128, 16, True),
    "one row": (1, 301, 320, 8, False),
    "no rows": (0, 50, 64, 4, False),
}


def case(name: str) -> tuple[Problem, int]:
    rows, vocab, padded, k, ties = CASES[name]
    return make_problem(rows, vocab, padded=padded, ties=ties, width=32).to(torch.float32), k


def shards(problem: Problem) -> tuple[HeadShard, HeadShard]:
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    ranks, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    student, teacher = (
        HeadShard.for_rank(weight.chunk(ranks)[rank].clone(), problem.vocab, group)
        for weight in (problem.student_weight, problem.teacher_weight)
    )
    return student, teacher


def compute(name: str, stages: int, chunk_bytes: int = 2**14) -> dict[str, torch.Tensor]:
    problem, k = case(name)
    heads = shards(problem)
    rough = (Fp8Head.of(heads[0]), Fp8Head.of(heads[1]))
    result = token_statistics(
        problem.student_hidden,
        problem.teacher_hidden,
        problem.tokens,
        *(heads if stages == 2 else rough),
        k=k,
        temperature=TEMPERATURE,
        logits_chunk_bytes=chunk_bytes,
        rough_heads=rough if stages == 2 else None,
    )
    return {name: getattr(result, name) for name in NAMES}


def expected(name: str, stages: int) -> dict[str, torch.Tensor]:
    """By definition: rough logits everywhere, in two stages exact ones at the 2 K best of either model and the token.

    The supports are then the K best *of these ids*, so all others are pushed down for ``top_ids`` and put back.
    """
    problem, k = case(name)
    vocab = problem.vocab
    rough = [
        rough_logits(problem.student_hidden, problem.student_weight[:vocab]) / TEMPERATURE,
        rough_logits(problem.teacher_hidden, problem.teacher_weight[:vocab]) / TEMPERATURE,
    ]
    exact = problem.logits(TEMPERATURE)
    rows = []
    for row, token in enumerate(problem.tokens.tolist()):
        s, t = (side[row].clone() for side in rough)
        if stages == 2:
            chosen = sorted({*top_ids(s, 2 * k), *top_ids(t, 2 * k), token})
            s[chosen], t[chosen] = exact[0][row][chosen], exact[1][row][chosen]
            for side in (s, t):
                others = [id for id in range(vocab) if id not in chosen]
                assert not others or side[others].max() < side[top_ids(side, k)[-1]], "the case leaves no doubt"
        rows.append(statistics_row(s, t, token, k, "exact"))
    columns = {column: [row[column] for row in rows] for column in NAMES}
    return {column: torch.tensor(values, dtype=torch.float64) for column, values in columns.items()}


@pytest.mark.parametrize("ranks", [1, 2])
# Which of equal logits is ahead after a rounded scale is for the exact stage alone to say.
@pytest.mark.parametrize(("name", "stages"), [(n, s) for n in CASES for s in (1, 2) if (n, s) != ("ties", 1)])
def test_equal_their_definition(pool: Callable[[int], WorkerPool], name: str, stages: int, ranks: int) -> None:
    want = expected(name, stages)
    for got in pool(ranks).run(compute, name, stages):
        for column in NAMES:
            torch.testing.assert_close(
                got[column].double(),
                want[column],
                rtol=3e-5,
                atol=3e-5,
                msg=lambda text, column=column: f"{column}: {text}",
            )


@pytest.mark.parametrize("stages", [1, 2])
def test_tiles_do_not_matter(stages: int) -> None:
    """Tiles of 32 ids and one tile. (Chunks of rows may differ in the columns that they leave out of FP8.)"""
    whole = compute("one row", stages)
    for column, values in compute("one row", stages, chunk_bytes=4 * 32).items():
        torch.testing.assert_close(values, whole[column], rtol=2e-5, atol=2e-5, msg=column)


@pytest.mark.parametrize("device", FP8_DEVICES)
def test_the_second_stage_gives_back_what_the_first_lost(device: str) -> None:
    """On a head of 4,000 ids and hidden states of 64: D exactly, C but for the normaliser's tail."""
    problem = make_problem(64, 4000, padded=4096, width=64, seed=3)
    problem.student_hidden = problem.student_hidden * 0.35
    problem.teacher_hidden = problem.teacher_hidden * 0.4
    problem = problem.to(torch.float32).on(device)
    student, teacher = shards(problem)
    rough = (Fp8Head.of(student), Fp8Head.of(teacher))
    hidden = (problem.student_hidden, problem.teacher_hidden, problem.tokens)
    exact = token_statistics(*hidden, student, teacher)
    errors = {}
    for stages, heads, rough_heads in ((1, rough, None), (2, (student, teacher), rough)):
        got = token_statistics(*hidden, *heads, rough_heads=rough_heads)
        errors[stages] = {name: (getattr(got, name) - getattr(exact, name)).abs().max().item() for name in ("D", "C")}
        if stages == 2:
            assert torch.equal(got.overlap, exact.overlap)
            assert torch.equal(got.rank_in_student, exact.rank_in_student)
    assert errors[2]["D"] < 1e-5 < 1e-3 < errors[1]["D"]
    assert errors[2]["C"] < 0.2 * errors[1]["C"]


@pytest.mark.parametrize("offset", [0.0, 80.0, -300.0])
@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
def test_replaced_sums(offset: float, spread: float) -> None:
    """Against the sums of the mixed logits in float64, also where the ids hold all of the mass."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.randn(2, 5, 60, generator=generator, dtype=torch.float64) * spread + offset
    exact = rough + torch.randn(2, 5, 60, generator=generator, dtype=torch.float64) * 0.3
    place = rough.sum(0).topk(8).indices
    counted = torch.ones(5, 8, dtype=torch.bool)
    counted[:, 3] = False

    def sums(logits: torch.Tensor) -> torch.Tensor:
        shifted = logits - logits.amax(-1, keepdim=True)
        mass, gap = shifted.exp(), logits[0] - logits[1]
        return torch.cat([logits.amax(-1), mass.sum(-1), (mass * shifted).sum(-1), (mass * gap).sum(-1)])

    rough_at, exact_at = (side.gather(-1, place.expand(2, -1, -1)) for side in (rough, exact))
    mixed = rough.scatter(-1, place.expand(2, -1, -1), exact_at.where(counted, rough_at))
    got = replace_in_sums(sums(rough), rough_at, exact_at, counted)
    # The same at the same maxima.
    want = combine_sums(torch.stack([sums(mixed), torch.cat([got[:2], torch.zeros(6, 5, dtype=torch.float64)])]))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert got.isfinite().all()
