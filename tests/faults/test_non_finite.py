"""A step whose loss or gradient is not finite changes nothing, leaves its batch behind, and is left out if allowed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_taopd import cli
from megatron_taopd.checkpoint import read_latest_iteration
from megatron_taopd.data.records import read_rollouts
from megatron_taopd.errors import NonFiniteError
from megatron_taopd.platform import distributed
from megatron_taopd.testing import WorkerPool
from megatron_taopd.training.hooks.base import Hook
from tests.faults.test_stops import run_with
from tests.oracle.cases import make_pair, make_rollouts

Pools = Callable[[int], WorkerPool]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    make_pair(root, "qwen3")
    make_rollouts(root / "rollouts.jsonl", count=12, seed=7)
    return root


def words(root: Path, out: Path, *further: str) -> list[str]:
    return [
        "train",
        f"--student={root / 'student'}",
        f"--teacher={root / 'teacher'}",
        "--rollout-engine=file",
        f"--rollout-data={root / 'rollouts.jsonl'}",
        "--global-batch-size=4",
        "--train-iters=3",
        "--keep-ratio=0.3",
        "--lr=1e-3",
        f"--log-dir={out}",
        f"--save={out / 'checkpoints'}",
        *further,
    ]


class Poison(Hook):
    """Spoils one rank's second step, in the gradient of a weight or in the hidden states; remembers every state."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.handle: Any = None
        self.weights: list[torch.Tensor] = []
        self.selection: list[str] = []

    def on_step(self, trainer: Any, metrics: dict[str, float]) -> None:
        module = trainer.pair.student.module
        self.weights.append(torch.cat([weight.detach().flatten() for weight in module.parameters()]))
        self.selection.append(json.dumps(trainer.scope.state(), sort_keys=True, default=str))
        if self.handle is not None:
            self.handle.remove()
        if metrics["iteration"] == 1 and distributed.rank() == 1:
            if self.what == "gradient":
                weight = dict(module.named_parameters())["decoder.layers.1.mlp.linear_fc2.weight"]
                self.handle = weight.register_hook(lambda gradient: gradient * torch.inf)
            else:
                self.handle = module.decoder.register_forward_hook(lambda m, i, hidden: hidden * torch.nan)


def _spoiled(root: Path, out: Path, what: str, *further: str) -> tuple[str, list[bool], list[bool]]:
    """The error, and whether weights and selection changed in each step after the first."""
    hook = Poison(what)
    error = ""
    try:
        assert run_with(words(root, out, *further), hook)
    except NonFiniteError as caught:
        error = str(caught)
        if hook.handle is not None:
            hook.handle.remove()
    changed = [not torch.equal(a, b) for a, b in zip(hook.weights, hook.weights[1:], strict=False)]
    moved = [a != b for a, b in zip(hook.selection, hook.selection[1:], strict=False)]
    return error, changed, moved


@pytest.mark.parametrize("what", ["gradient", "hidden"])
def test_left_out(pool: Pools, root: Path, tmp_path: Path, what: str) -> None:
    answers = pool(2).run(_spoiled, root, tmp_path, what, "--max-skipped-non-finite=1", "--selection-scope=carried")
    for error, changed, moved in answers:
        assert error == ""
        assert changed == [False, True]  # the spoiled step changes nothing, the next one goes on
        assert moved == [False, True]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0.0, 1.0, 0.0]
    assert [row["grad_norm"] is None for row in rows] == [False, True, False]
    left = tmp_path / "non_finite" / "iter_0000002"
    (found,) = json.loads((left / "report.json").read_text())["ranks"]
    assert found["rank"] == 1
    source = read_rollouts(root / "rollouts.jsonl")
    for replica in (0, 1):  # the second four, two a replica
        batch = source[4 + 2 * replica : 6 + 2 * replica]
        assert read_rollouts(left / f"rollouts_{replica:05d}.jsonl") == batch
        tensors = load_file(left / f"rows_{replica:05d}.safetensors")
        assert tensors["token_id"].tolist() == [token for rollout in batch for token in rollout.response_tokens]
        finite = torch.isfinite(tensors["kl_forward"])
        assert bool(finite.all()) or (what, replica) == ("hidden", 1)
    if what == "gradient":
        assert found["gradients"] == ["decoder.layers.1.mlp.linear_fc2.weight"] and not found["losses"]
    else:
        assert found["losses"] == [rollout.id for rollout in source[6:8]]
        assert found["rows"]["kl_forward"] == sum(len(rollout.response_tokens) for rollout in source[6:8])


def test_one_too_many_ends_the_run_with_a_checkpoint(pool: Pools, root: Path, tmp_path: Path) -> None:
    answers = pool(2).run(_spoiled, root, tmp_path, "gradient")
    for error, changed, _ in answers:
        assert changed == []
        assert error.startswith(
            "iteration 2 is not finite: rank 1: the gradient of decoder.layers.1.mlp.linear_fc2.weight;"
        )
        assert f"the batch is in {tmp_path}/non_finite/iter_0000002" in error
        assert "--max-skipped-non-finite (now 0) leaves such steps out" in error
    assert read_latest_iteration(tmp_path / "checkpoints") == 1


def _diverge(root: Path, out: Path, selector: str) -> str:
    """A learning rate that throws the weights out of range, at a layout with every kind of group."""
    layout = ("--tensor-model-parallel-size=2", "--optimizer=sgd", "--lr=1e25", "--clip-grad=0", "--weight-decay=0")
    try:
        cli.run(words(root, out, *layout, f"--selector={selector}"))
    except NonFiniteError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("selector", ["teachability", "random"])
def test_a_run_that_diverges(pool: Pools, root: Path, tmp_path: Path, selector: str) -> None:
    messages = pool(2).run(_diverge, root, tmp_path, selector)
    assert messages[0] == messages[1]
    assert messages[0].startswith("iteration 2 is not finite: rank 0: the loss of "), messages[0]
    assert "statistics of some positions (" in messages[0]
    assert read_latest_iteration(tmp_path / "checkpoints") == 1
