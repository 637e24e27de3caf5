"""Every loss at any vocabulary split: value and gradients equal float64 brute force under plain autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from megatron_taopd.errors import ConfigError
from megatron_taopd.losses import LOSSES, LossConfig, distillation_loss
from megatron_taopd.losses.functions import LossInputs
from megatron_taopd.losses.fused import FUSED_LOSSES
from megatron_taopd.ops import HeadShard
from megatron_taopd.testing import WorkerPool
from tests.naive import Problem, loss_rows, make_problem
from tests.traffic import Calls, counted_collectives, peak_live_bytes

LOSS_CASES = {
    "reverse_kl": LossConfig(),
    "forward_kl": LossConfig(loss="forward_kl"),
    "jsd": LossConfig(loss="jsd", jsd_beta=0.3),
    "sampled": LossConfig(loss="sampled_reverse_kl"),
    "sampled, clipped": LossConfig(loss="sampled_reverse_kl", loss_ratio_clip=0.2),
    **{
        f"{name}, {support}": LossConfig(loss=name, loss_support=support)
        for name in ("topk_reverse_kl", "topk_forward_kl")
        for support in ("student", "teacher", "union")
    },
}

# name: rows, real vocabulary, padded, K, temperature, ties, weights
PROBLEM_CASES = {
    "padding": (7, 101, 120, 16, 1.0, False, None),
    "temperature and weights": (5, 101, 120, 4, 0.7, False, [1.0, 0.0, 0.5, 2.0, 0.0]),
    "whole vocabulary": (4, 23, 24, 23, 1.0, False, None),
    "shards of padding alone": (3, 11, 48, 4, 1.5, False, None),
    "one row, K=1": (1, 37, 48, 1, 1.0, False, None),
    "all weights zero": (3, 37, 48, 4, 1.0, False, [0.0, 0.0, 0.0]),
    "ties": (6, 61, 72, 8, 1.0, True, None),
}

UPSTREAM_GRADIENT = 1.7


@dataclass
class Outcome:
    loss: torch.Tensor
    grad_hidden: torch.Tensor
    grad_weight: torch.Tensor
    metrics: dict[str, torch.Tensor]


def problem_of(case: str, dtype: torch.dtype) -> tuple[Problem, torch.Tensor | None]:
    rows, vocab, padded, _, _, ties, weights = PROBLEM_CASES[case]
    problem = make_problem(rows, vocab, padded=padded, ties=ties).to(dtype)
    return problem, None if weights is None else torch.tensor(weights)


def shards(problem: Problem) -> tuple[HeadShard, HeadShard, torch.Tensor]:
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    ranks, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    weight = problem.student_weight.chunk(ranks)[rank].clone().requires_grad_()
    student = HeadShard.for_rank(weight, problem.vocab, group)
    teacher = HeadShard.for_rank(problem.teacher_weight.chunk(ranks)[rank].clone(), problem.vocab, group)
    return student, teacher, weight


def run_one(
    problem: Problem,
    config: LossConfig,
    *,
    k: int = 16,
    temperature: float = 1.0,
    weights: torch.Tensor | None = None,
    chunk_rows: int = 2,
) -> Outcome:
    """Loss and gradients on this rank, as the training step uses them."""
    student, teacher, weight = shards(problem)
    hidden = problem.student_hidden.clone().requires_grad_()
    loss, metrics = distillation_loss(
        hidden,
        problem.teacher_hidden,
        problem.tokens,
        problem.old_logprobs,
        student,
        teacher,
        config=config,
        k=k,
        temperature=temperature,
        weights_R=weights,
        logits_chunk_bytes=4 * weight.shape[0] * chunk_rows,
    )
    (UPSTREAM_GRADIENT * loss).backward()
    return Outcome(loss.detach(), hidden.grad, weight.grad, metrics)


def run_all(dtype: torch.dtype) -> dict[tuple[str, str], Outcome]:
    results = {}
    for case, (_, _, _, k, temperature, _, _) in PROBLEM_CASES.items():
        problem, weights = problem_of(case, dtype)
        for loss, config in LOSS_CASES.items():
            results[case, loss] = run_one(problem, config, k=k, temperature=temperature, weights=weights)
    return results


def brute_force(case: str, config: LossConfig, dtype: torch.dtype) -> Outcome:
    problem, weights = problem_of(case, dtype)
    _, _, _, k, temperature, _, _ = PROBLEM_CASES[case]
    hidden = problem.student_hidden.double().requires_grad_()
    weight = problem.student_weight.double().requires_grad_()
    student = hidden @ weight[: problem.vocab].t() / temperature
    rows = loss_rows(
        config.loss,
        student,
        problem.logits(temperature)[1],
        problem.tokens,
        problem.old_logprobs.double(),
        k=k,
        support=config.loss_support,
        beta=config.jsd_beta,
        clip=config.loss_ratio_clip,
    )
    loss = (rows * (1 if weights is None else weights)).sum()
    (UPSTREAM_GRADIENT * loss).backward()
    return Outcome(loss.detach(), hidden.grad, weight.grad, {})


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
def test_value_and_gradient_equal_brute_force(
    pool: Callable[[int], WorkerPool], ranks: int, dtype: torch.dtype, tolerance: float
) -> None:
    per_rank = pool(ranks).run(run_all, dtype)
    for case in PROBLEM_CASES:
        for loss, config in LOSS_CASES.items():
            want = brute_force(case, config, dtype)
            outcomes = [results[case, loss] for results in per_rank]
            got = {
                "grad_hidden": sum(o.grad_hidden for o in outcomes),  # partial over the shards
                "grad_weight": torch.cat([o.grad_weight for o in outcomes]),
                **{f"loss on rank {rank}": o.loss for rank, o in enumerate(outcomes)},
            }
            scale = max(float(want.loss.abs()), 1.0)
            for name, actual in got.items():
                torch.testing.assert_close(
                    actual,
                    getattr(want, name.split(" ")[0]),
                    rtol=tolerance,
                    atol=tolerance * scale,
                    check_dtype=False,
                    msg=lambda text, at=f"{case}, {loss}, {name}": f"{at}: {text}",
                )


def traffic(k: int) -> dict[str, Calls]:
    """The collectives of loss and gradient of 8 rows in chunks of 4, by loss."""
    problem = make_problem(8, 101, padded=120).to(torch.float32)
    calls = {}
    for name, config in LOSS_CASES.items():
        with counted_collectives() as calls[name]:
            run_one(problem, config, k=k, chunk_rows=4)
    return calls


def expected_traffic(config: LossConfig, k: int) -> Calls:
    """A row: float64 columns of the fused losses; of a top-K loss the candidates (value and id) of its supports and the
    other model's maximum in float64, then for both models the support's logits, mass and tail in fp32."""
    columns = {"reverse_kl": 5, "forward_kl": 5, "jsd": 4, "sampled_reverse_kl": 6}
    if config.loss in columns:
        sums = [("all_reduce", 8 * 2)] if config.loss == "jsd" else []
        return [("all_gather", 8 * columns[config.loss]), *sums]
    supports = 2 if config.loss_support == "union" else 1
    return [("all_gather", 8 * (supports * 2 * k + 2 - supports)), ("all_reduce", 2 * 4 * (supports * k + 2))]


@pytest.mark.parametrize(("ranks", "k"), [(2, 16), (4, 5)])
def test_collectives_of_a_chunk_have_no_vocabulary_term(pool: Callable[[int], WorkerPool], ranks: int, k: int) -> None:
    """One a chunk, two for jsd and the top-K losses; of 4 rows each, in two chunks."""
    for calls in pool(ranks).run(traffic, k):
        for name, config in LOSS_CASES.items():
            assert calls[name] == 2 * [(kind, 4 * size) for kind, size in expected_traffic(config, k)], name


MEMORY_CASES = {"reverse_kl": 3, "forward_kl": 3, "jsd": 4, "sampled, clipped": 3, "topk_reverse_kl, union": 8.25}
"""Buffers of a chunk's logits that exist at once where a block of rows is the whole chunk, as on GPUs."""


@pytest.mark.parametrize("loss", MEMORY_CASES)
def test_memory_of_every_position_does_not_grow_with_rows_times_vocabulary(loss: str) -> None:
    """Loss and gradient where all positions are kept: chunks, the head's gradient and per-row numbers only."""
    vocab, chunk_rows = 20_000, 16
    chunk_bytes = 4 * vocab * chunk_rows

    def peak(rows: int) -> int:
        problem = make_problem(rows, vocab, padded=vocab).to(torch.float32)
        return peak_live_bytes(lambda: run_one(problem, LOSS_CASES[loss], chunk_rows=chunk_rows))

    small, large = peak(64), peak(512)
    weights = 4 * vocab * (12 + 16 + 12)  # both heads, which run_one copies, and the student's gradient
    assert 0 < small - weights - MEMORY_CASES[loss] * chunk_bytes < chunk_bytes / 10
    assert large - small < 448 * 200  # bytes a row; a row of one model's logits has 80,000


def two_ids(student: tuple[float, ...], teacher: tuple[float, ...]) -> Problem:
    """A problem whose logits are the logs of given probabilities, and whose sampled token is 1."""
    eye = torch.eye(len(student), dtype=torch.float64)
    hidden = [torch.tensor([p], dtype=torch.float64).log() for p in (student, teacher)]
    return Problem(*hidden, eye, eye, torch.tensor([1]), torch.tensor([math.log(0.125)]), len(student))


LOG2 = math.log(2)
P_S, P_T = (0.5, 0.25, 0.125, 0.125), (0.125, 0.5, 0.125, 0.25)


@pytest.mark.parametrize(
    ("config", "value"),
    [
        (LossConfig(loss="reverse_kl"), (0.5 * 2 - 0.25 - 0.125) * LOG2),
        (LossConfig(loss="forward_kl"), (-0.125 * 2 + 0.5 + 0.25) * LOG2),
        (LossConfig(loss="jsd", jsd_beta=0.0), (-0.125 * 2 + 0.5 + 0.25) * LOG2),
        (LossConfig(loss="jsd", jsd_beta=1.0), (0.5 * 2 - 0.25 - 0.125) * LOG2),
        # K = 2. Student support {0, 1}, tails 1/4 and 3/8.
        (LossConfig(loss="topk_reverse_kl"), 0.5 * 2 * LOG2 - 0.25 * LOG2 + 0.25 * math.log(2 / 3)),
        (LossConfig(loss="topk_forward_kl"), -0.125 * 2 * LOG2 + 0.5 * LOG2 + 0.375 * math.log(3 / 2)),
        # Teacher support {1, 3}, tails 5/8 and 1/4.
        (
            LossConfig(loss="topk_reverse_kl", loss_support="teacher"),
            -0.25 * LOG2 - 0.125 * LOG2 + 0.625 * math.log(2.5),
        ),
        # Union {0, 1, 3}: the tail is id 2 alone, and nothing is lost.
        (
            LossConfig(loss="topk_forward_kl", loss_support="union"),
            (-0.125 * 2 + 0.5 + 0.25) * LOG2,
        ),
        # Token 1: A = log(0.5 / 0.125) = 2 log 2, r = 0.25 / 0.125 = 2.
        (LossConfig(loss="sampled_reverse_kl"), -2 * LOG2 * 2),
        (LossConfig(loss="sampled_reverse_kl", loss_ratio_clip=0.2), -2 * LOG2 * 1.2),
    ],
)
def test_by_hand(config: LossConfig, value: float) -> None:
    assert run_one(two_ids(P_S, P_T), config, k=2).loss.item() == pytest.approx(value)


def test_sampled_loss_reports_ratio_and_clipping() -> None:
    metrics = run_one(two_ids(P_S, P_T), LossConfig(loss="sampled_reverse_kl", loss_ratio_clip=0.2)).metrics
    assert metrics["importance_ratio"].item() == pytest.approx(2.0)
    assert metrics["clipped_share"].item() == 1.0


def test_clipped_ratio_has_no_gradient() -> None:
    clipped = run_one(two_ids(P_S, P_T), LossConfig(loss="sampled_reverse_kl", loss_ratio_clip=0.2))
    free = run_one(two_ids(P_S, P_T), LossConfig(loss="sampled_reverse_kl"))
    assert clipped.grad_hidden.abs().max() == 0
    assert free.grad_hidden.abs().max() > 0.1


def test_top_one_still_teaches() -> None:
    """Renormalised on one id a KL is identically zero; the tail bucket keeps the gradient."""
    for name in ("topk_reverse_kl", "topk_forward_kl"):
        outcome = run_one(two_ids(P_S, P_T), LossConfig(loss=name), k=1)
        assert outcome.loss > 0.1 and outcome.grad_hidden.abs().max() > 0.1


def test_equal_models_are_at_rest() -> None:
    for name, config in LOSS_CASES.items():
        if config.loss == "sampled_reverse_kl":
            continue
        outcome = run_one(two_ids(P_S, P_S), config, k=2)
        assert outcome.loss.abs() < 1e-15 and outcome.grad_hidden.abs().max() < 1e-15, name


def test_small_tail_is_not_lost_in_fp32() -> None:
    """Tails of 1e-10 and 1e-9: 1 minus the rest would round both to 0 in fp32."""
    student, teacher = (1 - 2e-10, 1e-10, 1e-10), (1 - 2e-9, 1e-9, 1e-9)
    outcome = run_one(two_ids(student, teacher).to(torch.float32), LossConfig(loss="topk_forward_kl"), k=1)
    want = 2e-9 * math.log(10) - 2e-9 + 2e-10
    tail_gradient = -(2e-9 - 2e-10) / 2
    assert outcome.grad_weight is not None
    assert outcome.grad_hidden[0, 1].item() / UPSTREAM_GRADIENT == pytest.approx(tail_gradient, rel=1e-3)
    assert outcome.loss.item() == pytest.approx(want, abs=3e-9)


def no_rows(loss: str) -> tuple[float, torch.Tensor, torch.Tensor, list[str]]:
    problem = make_problem(0, 50, padded=60).to(torch.float32)
    outcome = run_one(problem, LOSS_CASES[loss], k=4)
    return float(outcome.loss), outcome.grad_hidden, outcome.grad_weight, sorted(outcome.metrics)


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_rows_keep_the_graph_alive(pool: Callable[[int], WorkerPool], ranks: int) -> None:
    for loss in LOSS_CASES:
        for value, grad_hidden, grad_weight, metrics in pool(ranks).run(no_rows, loss):
            assert value == 0.0
            assert grad_hidden.shape == (0, 12)
            assert grad_weight.shape == (60 // ranks, 12) and grad_weight.abs().max() == 0
            if loss == "sampled, clipped":
                assert metrics == ["clipped_share", "importance_ratio"]


def test_chunks_do_not_matter() -> None:
    problem, _ = problem_of("padding", torch.float64)
    whole = run_one(problem, LossConfig(), chunk_rows=100)
    for chunk_rows in (1, 3, 7):
        part = run_one(problem, LossConfig(), chunk_rows=chunk_rows)
        torch.testing.assert_close(part.loss, whole.loss)
        torch.testing.assert_close(part.grad_hidden, whole.grad_hidden)
        torch.testing.assert_close(part.grad_weight, whole.grad_weight)


def test_weight_zero_hides_a_row_that_is_not_finite() -> None:
    problem, _ = problem_of("padding", torch.float64)
    clean = run_one(problem, LossConfig(), weights=torch.tensor([1.0] * 6 + [0.0]))
    problem.old_logprobs[6] = -math.inf
    config = LossConfig(loss="sampled_reverse_kl")
    outcome = run_one(problem, config, weights=torch.tensor([1.0] * 6 + [0.0]))
    assert clean.grad_hidden[6].abs().max() == 0
    assert math.isfinite(outcome.loss)


def test_frozen_head_and_evaluation() -> None:
    """Only what asks for a gradient gets one, and under no_grad nothing is kept."""
    problem, _ = problem_of("padding", torch.float64)
    student, teacher, weight = shards(problem)
    weight.requires_grad_(False)
    hidden = problem.student_hidden.clone().requires_grad_()
    common = (problem.teacher_hidden, problem.tokens, problem.old_logprobs, student, teacher)
    loss, _ = distillation_loss(hidden, *common, config=LossConfig())
    loss.backward()
    assert weight.grad is None and hidden.grad.abs().max() > 0
    with torch.no_grad():
        evaluated, _ = distillation_loss(hidden, *common, config=LossConfig())
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, loss.detach())


def test_second_backward_is_refused() -> None:
    problem, _ = problem_of("padding", torch.float64)
    student, teacher, _ = shards(problem)
    loss, _ = distillation_loss(
        problem.student_hidden,
        problem.teacher_hidden,
        problem.tokens,
        problem.old_logprobs,
        student,
        teacher,
        config=LossConfig(),
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_bf16_stays_close() -> None:
    """bf16 hidden states and heads: logits and loss in fp32, gradients in bf16."""
    problem, _ = problem_of("padding", torch.bfloat16)
    outcome = run_one(problem, LossConfig())
    want = brute_force("padding", LossConfig(), torch.bfloat16)
    assert outcome.loss.dtype == torch.float32 and outcome.grad_weight.dtype == torch.bfloat16
    torch.testing.assert_close(outcome.loss.double(), want.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outcome.grad_hidden.double(), want.grad_hidden, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(outcome.grad_weight.double(), want.grad_weight, rtol=2e-2, atol=2e-2)


def test_head_gradient_reaches_main_grad_in_fp32() -> None:
    """Megatron's DDP keeps an fp32 ``main_grad`` beside bf16 weights: what arrives there is not rounded to bf16,
    adds to what is there, and is not added a second time through ``.grad``."""
    problem, _ = problem_of("padding", torch.bfloat16)
    student, teacher, weight = shards(problem)
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
    for _ in range(2):
        loss, _ = distillation_loss(
            problem.student_hidden.clone().requires_grad_(),
            problem.teacher_hidden,
            problem.tokens,
            problem.old_logprobs,
            student,
            teacher,
            config=LossConfig(),
        )
        (UPSTREAM_GRADIENT * loss).backward()
    assert weight.grad.abs().max() == 0
    hidden = problem.student_hidden.float()
    logits = (hidden @ weight.detach().float()[: problem.vocab].t()).requires_grad_()
    log_s = logits.log_softmax(-1)
    log_t = problem.logits()[1].float().log_softmax(-1)
    (grad_logits,) = torch.autograd.grad((log_s.exp() * (log_s - log_t)).sum(), logits)
    # The gradient of the logits is rounded to bf16 before the product, as every operand is; the sum is not.
    want = 1 + 2 * UPSTREAM_GRADIENT * (grad_logits.bfloat16().float().t() @ hidden)
    torch.testing.assert_close(weight.main_grad[: problem.vocab], want, rtol=1e-5, atol=1e-4)


def test_fused_losses_equal_the_plain_functions() -> None:
    """Over several blocks of rows and chunks, in fp32 at the size of a real vocabulary."""
    problem = make_problem(70, 30_000, padded=30_016).to(torch.float32)
    for loss, config in LOSS_CASES.items():
        if config.loss not in FUSED_LOSSES:
            continue
        fused = run_one(problem, config, chunk_rows=40)
        student = problem.logits()[0].requires_grad_()
        rows, _ = LOSSES[config.loss](
            LossInputs(
                student_logits_RV=student,
                teacher_logits_RV=problem.logits()[1],
                token_ids_R=problem.tokens,
                old_logprobs_R=problem.old_logprobs.double(),
                vocab_start=0,
                vocab_size=problem.vocab,
                group=None,
                jsd_beta=config.jsd_beta or 0.5,
                ratio_clip=config.loss_ratio_clip,
            )
        )
        (grad,) = torch.autograd.grad(rows.sum(), student)
        want = UPSTREAM_GRADIENT * grad @ problem.student_weight[: problem.vocab].double()
        torch.testing.assert_close(fused.loss.double(), rows.sum().detach(), rtol=1e-5, atol=1e-5, msg=loss)
        torch.testing.assert_close(fused.grad_hidden.double(), want, rtol=1e-4, atol=1e-4, msg=loss)


def mine(x):
    return x.student_logits_RV.sum(-1), {}


def test_own_loss_by_path() -> None:
    problem, _ = problem_of("padding", torch.float64)
    outcome = run_one(problem, LossConfig(loss="tests.losses.test_losses:mine"))
    torch.testing.assert_close(outcome.loss, problem.logits()[0].sum())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "reverse_lk"}, "unknown loss 'reverse_lk'; did you mean 'reverse_kl'"),
        ({"loss": "tests.losses:nothing"}, "cannot be imported"),
        ({"loss_support": "union"}, "--loss-support union has no effect with --loss reverse_kl"),
        ({"loss": "jsd", "loss_support": "union"}, "has no effect with --loss jsd"),
        ({"jsd_beta": 0.5}, "--jsd-beta 0.5 has no effect"),
        ({"loss": "jsd", "jsd_beta": 1.5}, r"--jsd-beta 1.5 must be in \[0, 1\]"),
        ({"loss_ratio_clip": 0.2}, "--loss-ratio-clip 0.2 has no effect"),
        ({"loss": "sampled_reverse_kl", "loss_ratio_clip": -1}, "must be positive"),
    ],
)
def test_bad_configuration(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LossConfig(**options)


def test_support_larger_than_vocabulary() -> None:
    problem, _ = problem_of("whole vocabulary", torch.float64)
    with pytest.raises(ConfigError, match="--support-k 24 must be between 1 and the vocabulary size 23"):
        run_one(problem, LossConfig(loss="topk_reverse_kl"), k=24)
    assert "topk_reverse_kl" in LOSSES
