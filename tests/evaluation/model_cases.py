"""What the ranks run for test_model.py: the command, and an evaluation of a model that is being trained."""

from __future__ import annotations

from typing import Any

import torch

from megatron_taopd import cli
from megatron_taopd.errors import TaopdError
from megatron_taopd.evaluation.model import evaluate
from megatron_taopd.evaluation.options import TaskOptions
from megatron_taopd.evaluation.tasks import load_tasks
from megatron_taopd.models import load_model
from megatron_taopd.platform import distributed
from megatron_taopd.platform.layout import ParallelConfig


def command_case(words: list[str]) -> str | None:
    """``taopd eval``; the message if it refuses."""
    try:
        assert cli.run(["eval", *words]) == 0
    except TaopdError as error:
        return str(error)
    return None


def live_case(path: str, spec: str, options: dict[str, Any]) -> dict[str, Any]:
    """A model in training mode, before and after its weights changed."""
    parallel = ParallelConfig()
    distributed.initialize(parallel, seed=1)
    model = load_model(path, parallel, params_dtype=torch.float32, trainable=True)
    tasks = load_tasks([spec], TaskOptions(**options))
    before = evaluate(model, tasks, seed=3, name="before")
    again = evaluate(model, tasks, seed=3)
    assert model.module.training and all(p.requires_grad for p in model.module.parameters())
    with torch.no_grad():
        model.module.output_layer.weight.mul_(-1)
    after = evaluate(model, tasks, seed=3)
    return {"before": before, "again": again, "after": after}
