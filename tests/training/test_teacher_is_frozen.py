"""Training leaves a teacher with experts as it was: routers in eval mode, every parameter and buffer to the bit."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_taopd import cli
from megatron_taopd.training import pair
from tests.oracle.cases import make_pair, make_rollouts


def tensors(modules: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    return {
        f"{number} {name}": value.detach().clone()
        for number, module in enumerate(modules)
        for name, value in (*module.named_parameters(), *module.named_buffers())
    }


def train(root: Path) -> tuple[list[str], list[str]]:
    """Runs in every rank: tensors of teacher and student that two steps changed."""
    from megatron.core.transformer.moe.router import TopKRouter

    original, made = pair.load_pair, []

    def load_pair(*args, **kwargs):
        loaded = original(*args, **kwargs)
        models = [loaded.teachers[0].model, loaded.student]
        made.extend((model, tensors(model.modules)) for model in models)
        return loaded

    pair.load_pair = load_pair
    try:
        cli.run(
            [
                *("train", f"--student={root / 'student'}", f"--teacher={root / 'teacher'}", "--train-iters=2"),
                *("--rollout-engine=file", f"--rollout-data={root / 'rollouts.jsonl'}", "--global-batch-size=4"),
                *("--lr=1e-2", "--expert-model-parallel-size=2", "--loss=forward_kl"),
            ]
        )
    finally:
        pair.load_pair = original
    changed = []
    for is_student, (model, before) in enumerate(made):
        routers = [part for module in model.modules for part in module.modules() if isinstance(part, TopKRouter)]
        assert len(routers) == model.hf.num_layers
        assert all(router.training == bool(is_student) for router in routers)
        assert model.config.moe_aux_loss_coeff == 0.0 and not model.config.moe_router_enable_expert_bias
        after = tensors(model.modules)
        assert after.keys() == before.keys()
        changed.append([name for name, value in before.items() if not torch.equal(after[name], value)])
    return changed[0], changed[1]


def test_teacher_with_experts(pool, tmp_path: Path) -> None:
    make_pair(tmp_path, "qwen3_moe")
    make_rollouts(tmp_path / "rollouts.jsonl")
    for of_teacher, of_student in pool(2).run(train, tmp_path):
        assert of_teacher == []
        assert any("router" in name for name in of_student)  # what is compared does change where it may
