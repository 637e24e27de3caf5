"""The Triton kernel in Triton's interpreter, on CPU tensors: run by ``test_triton.py`` in a process of its own, because
``TRITON_INTERPRET=1`` must be set before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from megatron_taopd import cli
from megatron_taopd.ops import triton_statistics
from megatron_taopd.ops.candidates import ABSENT_ID
from megatron_taopd.ops.triton_statistics import TileStatistics, tile_statistics
from megatron_taopd.testing import WorkerPool
from tests.naive import make_problem
from tests.oracle.cases import make_pair, make_rollouts
from tests.teachability.test_statistics import CASES, NAMES, compute, expected

FIRST_ID = 1000


def random_logits(rows: int, width: int, *, ties: bool = False, offset: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(-3, 3, (rows, width), generator=generator).float() + offset
    return torch.randn(rows, width, generator=generator) * 4 + offset


def padded(logits_RW: torch.Tensor) -> torch.Tensor:
    """With columns behind the real ones that would be noticed if they were read."""
    return torch.cat([logits_RW, torch.full((logits_RW.shape[0], 7), torch.nan, dtype=logits_RW.dtype)], dim=-1)


def check(student_RW: torch.Tensor, teacher_RW: torch.Tensor, k: int, got: TileStatistics) -> None:
    """Against float64 sums over whole rows, and a sort by value and then id."""
    student, teacher = student_RW.double(), teacher_RW.double()
    width, gap = student.shape[1], student - teacher
    for side, (own, other) in enumerate(((student, teacher), (teacher, student))):
        log_p = own.log_softmax(-1)
        maximum, mass, dot, gap_sum = (got.sums_8R[place + side] for place in (0, 2, 4, 6))
        close = {"rtol": 4e-6, "atol": 4e-6}
        assert torch.equal(maximum, own.amax(-1))
        torch.testing.assert_close(maximum + mass.log(), own.logsumexp(-1), **close)
        torch.testing.assert_close(mass.log() - dot / mass, -(log_p.exp() * log_p).sum(-1), **close)
        torch.testing.assert_close(gap_sum / mass, (log_p.exp() * gap).sum(-1), **close)

        ids = torch.tensor([sorted(range(width), key=lambda i: (-row[i], i))[:k] for row in own.tolist()])
        order = got.ids_2RK[side].argsort(-1)
        in_order = ids.sort(-1).values
        found = in_order.shape[1]
        assert torch.equal(got.ids_2RK[side].gather(-1, order)[:, :found], in_order + FIRST_ID)
        assert torch.equal(got.own_2RK[side].gather(-1, order)[:, :found].double(), own.gather(-1, in_order))
        assert torch.equal(got.other_2RK[side].gather(-1, order)[:, :found].double(), other.gather(-1, in_order))
        assert (got.ids_2RK[side].gather(-1, order)[:, found:] == ABSENT_ID).all()
        assert (got.own_2RK[side].gather(-1, order)[:, found:] == -torch.inf).all()


# name: rows, width, K, ties, the teacher's offset, type
TILES = {
    "rows that fill no block": (7, 101, 16, False, 0.0, torch.float32),
    "more columns than a step": (5, 4096 + 905, 16, False, 0.0, torch.float32),
    "ties": (9, 300, 16, True, 0.0, torch.float32),
    "ties over steps": (3, 4096 + 100, 5, True, 0.0, torch.float32),
    "bf16": (6, 500, 16, False, 0.0, torch.bfloat16),
    "logits far apart": (4, 200, 16, False, -90.0, torch.float32),
    "K larger than the columns": (3, 5, 16, False, 0.0, torch.float32),
    "one column": (2, 1, 4, False, 0.0, torch.float32),
    "K=1": (3, 70, 1, True, 0.0, torch.float32),
    "K of no power of two": (3, 70, 13, True, 0.0, torch.float32),
}


@pytest.mark.parametrize("case", TILES)
def test_a_tile_equals_float64(case: str) -> None:
    rows, width, k, ties, offset, dtype = TILES[case]
    student = random_logits(rows, width, ties=ties).to(dtype)
    teacher = random_logits(rows, width, ties=ties, offset=offset, seed=1).to(dtype)
    got = tile_statistics(padded(student), padded(teacher), width=width, k=k, first_id=FIRST_ID)
    check(student, teacher, k, got)


def test_rows_in_any_order() -> None:
    """Ascending rows, descending ones, and equal values, of which the first ids stay; -0.0 equals 0.0."""
    up = torch.arange(96.0) / 8
    zeros = torch.zeros(96)
    zeros[::2] = -0.0
    student = torch.stack([up, -up, zeros, zeros.roll(1)])
    got = tile_statistics(padded(student), padded(-student), width=96, k=8, first_id=FIRST_ID)
    check(student, -student, 8, got)
    assert got.ids_2RK[0, 2].sort().values.tolist() == list(range(FIRST_ID, FIRST_ID + 8))


def test_as_a_gpu_is_given_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a program and several steps, the shape of a launch outside the interpreter."""
    monkeypatch.setattr(triton_statistics, "_rows_and_columns", lambda num_rows, width: (1, 64))
    for ties in (False, True):
        student, teacher = random_logits(3, 200, ties=ties), random_logits(3, 200, ties=ties, seed=1)
        got = tile_statistics(padded(student), padded(teacher), width=200, k=16, first_id=FIRST_ID)
        check(student, teacher, 16, got)


def statistics_of_all_cases() -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    results = {}
    for name, (rows, vocab, padded_vocab, k, temperature, ties) in CASES.items():
        problem = make_problem(rows, vocab, padded=padded_vocab, ties=ties).to(torch.float32)
        results[name] = {
            kernel: compute(problem, k=k, temperature=temperature, kernel=kernel) for kernel in ("torch", "triton")
        }
    return results


def test_token_statistics_on_shards(pool: Callable[[int], WorkerPool]) -> None:
    """Through the public function, the vocabulary on two ranks: every column of brute force and of the torch passes."""
    per_rank = pool(2).run(statistics_of_all_cases)
    for name, (rows, vocab, padded_vocab, k, temperature, ties) in CASES.items():
        problem = make_problem(rows, vocab, padded=padded_vocab, ties=ties).to(torch.float32)
        want = expected(problem, k, temperature, "exact")
        for got in (results[name] for results in per_rank):
            for column in NAMES:
                at = f"{name}, {column}"
                close = {"rtol": 2e-5, "atol": 2e-5, "check_dtype": False, "msg": lambda text, at=at: f"{at}: {text}"}
                torch.testing.assert_close(got["triton"][column], want[column], **close)
                if want[column].is_floating_point():
                    torch.testing.assert_close(got["triton"][column], got["torch"][column], **close)
                else:
                    assert torch.equal(got["triton"][column], got["torch"][column]), at


def score(root: Path) -> None:
    """Runs in every rank."""
    for kernel in ("torch", "triton"):
        cli.run(
            [
                "score",
                f"--student={root / 'student'}",
                f"--teacher={root / 'teacher'}",
                f"--rollout-data={root / 'rollouts.jsonl'}",
                f"--output={root / kernel}.parquet",
                f"--statistics-kernel={kernel}",
                "--micro-batch-size=4",
                "--keep-ratio=0.2",
                "--tensor-model-parallel-size=2",
            ]
        )


def test_score_keeps_the_same_positions(pool: Callable[[int], WorkerPool], tmp_path: Path) -> None:
    make_pair(tmp_path, "qwen3")
    make_rollouts(tmp_path / "rollouts.jsonl")
    pool(2).run(score, tmp_path)
    torch_table, table = (pq.read_table(f"{tmp_path / kernel}.parquet") for kernel in ("torch", "triton"))
    kept = table["keep"].to_pylist()
    assert kept == torch_table["keep"].to_pylist()
    assert 0 < sum(kept) < table.num_rows
    for column in ("D", "C", "H", "kl_forward", "kl_reverse"):
        value, want = (torch.tensor(t[column].to_pylist()) for t in (table, torch_table))
        torch.testing.assert_close(value, want, rtol=1e-5, atol=1e-5)
