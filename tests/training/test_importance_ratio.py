"""``--importance-ratio``: the weighted loss and its gradient against HF autograd in float64, and what is refused."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_taopd import cli
from megatron_taopd.data.batches import make_micro_batches
from megatron_taopd.data.records import Rollout
from megatron_taopd.errors import DataError
from megatron_taopd.losses import LossConfig, distillation_loss
from megatron_taopd.ops.head import HeadShard
from megatron_taopd.training.importance import importance_weights
from tests.oracle import reference
from tests.oracle.cases import STUDENT_VOCAB, make_pair, make_rollouts

LR, KEEP_RATIO, K, TEMPERATURE, CLIP = 0.5, 0.5, 8, 1.3, 1.5
LAYOUTS = {
    "TP1": (1, ()),
    "TP2": (2, ("--tensor-model-parallel-size=2",)),
    "CP2": (2, ("--context-parallel-size=2", "--packed-sequences")),
}
# name -> (loss, kind, normalisation)
CASES = {
    "reverse-prefix": ("reverse_kl", "prefix", "kept"),
    "topk-token": ("topk_reverse_kl", "token", "valid"),
    "sampled-prefix": ("sampled_reverse_kl", "prefix", "kept"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, and responses recorded from a policy that is near the student's."""
    root = tmp_path_factory.mktemp("importance")
    make_pair(root, "qwen3")
    rows = make_rollouts(root / "rollouts.jsonl", seed=4)
    (root / "without.jsonl").write_text((root / "rollouts.jsonl").read_text())
    student, rng = reference.load_float64(root / "student"), random.Random(5)
    for row in rows:
        with torch.no_grad():
            log_p = (reference.response_logits(student, row, STUDENT_VOCAB) / TEMPERATURE).log_softmax(-1)
        own = log_p.gather(-1, torch.tensor(row["response_tokens"])[:, None])[:, 0].tolist()
        row["response_logprobs"] = [p + rng.gauss(0.0, 0.3) for p in own]
    (root / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def words(root: Path, case: str, *more: str) -> list[str]:
    loss, kind, normalisation = CASES[case]
    return [
        "train",
        f"--student={root / 'student'}",
        f"--teacher={root / 'teacher'}",
        "--rollout-engine=file",
        f"--rollout-data={root / 'rollouts.jsonl'}",
        f"--temperature={TEMPERATURE}",
        "--micro-batch-size=2",
        "--train-iters=1",
        f"--keep-ratio={KEEP_RATIO}",
        f"--support-k={K}",
        f"--loss={loss}",
        f"--loss-normalization={normalisation}",
        f"--importance-ratio={kind}",
        f"--importance-ratio-clip={CLIP}",
        "--optimizer=sgd",
        f"--lr={LR}",
        "--weight-decay=0",
        "--clip-grad=0",
        *more,
    ]


def reference_weights(kind: str, log_ratios: list[list[float]]) -> list[float]:
    """By the definition, a response after another."""
    weights = []
    for ratios in log_ratios:
        for t in range(len(ratios)):
            product = math.exp(ratios[t]) if kind == "token" else math.prod(math.exp(r) for r in ratios[:t])
            weights.append(min(CLIP, product))
    return weights


def reference_step(root: Path, case: str) -> tuple[dict[str, torch.Tensor], float, torch.Tensor]:
    """Gradients by HF name, the loss, and the weights of the kept positions."""
    loss, kind, normalisation = CASES[case]
    student, teacher = (reference.load_float64(root / name) for name in ("student", "teacher"))
    rollouts = reference.read_jsonl(root / "rollouts.jsonl")
    table = reference.statistics_table(
        student, teacher, rollouts, vocab_size=STUDENT_VOCAB, k=K, temperature=TEMPERATURE
    )
    keep = torch.tensor(reference.teachability_keep(table, KEEP_RATIO))
    own = iter([row["student_logprob"] for row in table])
    weights = torch.tensor(
        reference_weights(kind, [[next(own) - old for old in r["response_logprobs"]] for r in rollouts]),
        dtype=torch.float64,
    )[keep]
    logits = {
        name: torch.cat([reference.response_logits(model, r, STUDENT_VOCAB) for r in rollouts])[keep] / TEMPERATURE
        for name, model in (("student", student), ("teacher", teacher))
    }
    old = torch.tensor([p for r in rollouts for p in r["response_logprobs"]], dtype=torch.float64)[keep]
    tokens = torch.tensor([row["token_id"] for row in table])[keep]
    rows = reference.loss_rows(
        loss, logits["student"], logits["teacher"].detach(), tokens, k=K, support="student", old_logprobs=old
    )
    value = (rows * weights).sum() / (len(rows) if normalisation == "kept" else len(table))
    value.backward()
    return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}, value.item(), weights


@pytest.fixture(scope="module")
def references(root: Path) -> dict[str, tuple[dict[str, torch.Tensor], float, torch.Tensor]]:
    return {case: reference_step(root, case) for case in CASES}


def cases_at(layout: str) -> list[str]:
    """A token's own ratio is the same wherever its response is cut."""
    return [case for case, (_, kind, _) in CASES.items() if layout != "CP2" or kind == "prefix"]


def train_all(root: Path, layout: str) -> None:
    """Runs in every rank."""
    for case in cases_at(layout):
        out = root / f"{layout}-{case}"
        cli.run(words(root, case, f"--log-dir={out}", f"--export-hf={out / 'hf'}", *LAYOUTS[layout][1]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_sgd_step_equals_hf_autograd(pool, root: Path, references, layout: str) -> None:
    pool(LAYOUTS[layout][0]).run(train_all, root, layout)
    start = load_file(root / "student" / "model.safetensors")
    for case in cases_at(layout):
        grads, value, weights = references[case]
        out = root / f"{layout}-{case}"
        after = load_file(out / "hf" / "model.safetensors")
        wrong = total = 0.0
        for name, before in start.items():
            wanted = -LR * grads.get(name, torch.zeros_like(before, dtype=torch.float64))
            difference = (after[name].double() - before.double() - wanted).norm().item()
            wrong, total = wrong + difference**2, total + wanted.norm().item() ** 2
        assert (wrong / total) ** 0.5 <= 1e-2, case
        metrics = json.loads((out / "metrics.jsonl").read_text())
        assert metrics["loss"] == pytest.approx(value, rel=1e-4), case
        assert metrics["importance_weight"] == pytest.approx(weights.mean().item(), rel=1e-4), case
        clipped = (weights == CLIP).double().mean().item()
        assert 0 < clipped < 1 and metrics["importance_weight_clipped_share"] == pytest.approx(clipped), case
        # Gaussian noise of deviation 0.3: the mean distance is 0.3 sqrt(2 / pi).
        assert metrics["rollout_logprob_gap"] == pytest.approx(0.3 * math.sqrt(2 / math.pi), rel=0.3), case


@pytest.mark.parametrize("kind", ["token", "prefix"])
def test_responses_of_the_student_itself_leave_the_loss_bitwise(kind) -> None:
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(n, generator=generator).sub(5).tolist() for n in (3, 1, 4)]
    rollouts = [
        Rollout(id=str(i), prompt_tokens=[1], response_tokens=[3 + t for t in range(len(p))], response_logprobs=p)
        for i, p in enumerate(own)
    ]
    (micro_batch,) = make_micro_batches(rollouts, micro_batch_size=3, sample_offset=7)
    assert micro_batch.rollout_logprobs_R is not None
    weights = importance_weights(kind, micro_batch.rollout_logprobs_R, micro_batch, clip=2.0)
    assert weights.tolist() == [1.0] * 8
    for config in (LossConfig(), LossConfig(loss="topk_forward_kl"), LossConfig(loss="sampled_reverse_kl")):
        results = []
        for given in (None, weights):
            hidden = torch.randn(8, 6, generator=generator.manual_seed(1), requires_grad=True)
            head = torch.randn(32, 6, generator=generator, requires_grad=True)
            loss, _ = distillation_loss(
                hidden,
                torch.randn(8, 6, generator=generator),
                micro_batch.token_ids_R,
                micro_batch.rollout_logprobs_R,
                HeadShard.for_rank(head, 32, None),
                HeadShard.for_rank(torch.randn(32, 6, generator=generator), 32, None),
                config=config,
                k=4,
                weights_R=given,
            )
            loss.backward()
            results.append([loss.detach(), hidden.grad, head.grad])
        assert all(torch.equal(plain, weighted) for plain, weighted in zip(*results, strict=True))


def test_a_prefix_is_weighed_by_the_product_of_the_ratios_before() -> None:
    old = [-1.0, -2.0, -3.0]
    (micro_batch,) = make_micro_batches(
        [Rollout(id="0", prompt_tokens=[1], response_tokens=[3, 4, 5], response_logprobs=old)],
        micro_batch_size=1,
        sample_offset=0,
    )
    new = torch.tensor([-1.5, -1.0, -9.0], dtype=torch.float64)
    prefix = importance_weights("prefix", new, micro_batch, clip=10.0)
    assert prefix.tolist() == pytest.approx([1.0, math.exp(-0.5), math.exp(0.5)])
    assert importance_weights("token", new, micro_batch, clip=2.0).tolist() == pytest.approx(
        [math.exp(-0.5), 2.0, math.exp(-6.0)]
    )


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (("--loss=sampled_reverse_kl", "--importance-ratio=token"), ("twice", "prefix")),
        (("--importance-ratio=none",), ("--importance-ratio-clip 1.5", "no effect")),
        (("--importance-ratio-clip=0.5",), ("--importance-ratio-clip 0.5", "at least 1")),
        (("--temperature=0", "--distillation-temperature=1"), ("--temperature 0", "likeliest")),
        (("--distillation-temperature=1",), ("--distillation-temperature 1", "--temperature 1.3")),
    ],
)
def test_refused(capsys, root: Path, flags: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        cli.run(words(root, "reverse-prefix", *flags))
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for word in wanted:
        assert word in message


def refuse_without_logprobs(root: Path) -> str:
    """Runs in a rank."""
    with pytest.raises(DataError) as refusal:
        cli.run(words(root, "reverse-prefix", f"--rollout-data={root / 'without.jsonl'}"))
    return str(refusal.value)


def test_responses_without_logprobs_are_refused(pool, root: Path) -> None:
    (message,) = pool(1).run(refuse_without_logprobs, root)
    assert "--importance-ratio prefix" in message and "response_logprobs" in message
