"""Training on CPU ranks through Megatron's own schedule, DDP and optimizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_taopd.convert import export_hf
from megatron_taopd.errors import ConfigError
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.models import harness
from tests.platform import training
from tests.transformers_experts import per_expert

MODELS = {"qwen3-tied": ("qwen3", True), "qwen2-untied": ("qwen2", False), "qwen3_moe": ("qwen3_moe", False)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("training")
    return {
        name: str(save_tiny_hf_model(root / name, family, tied=tied, seed=4)) for name, (family, tied) in MODELS.items()
    }


def _sgd_step(models: dict[str, str], layout: str, out: str) -> dict[str, float]:
    parallel = harness.start(layout)
    norms = {}
    for name, path in models.items():
        loaded = harness.load(path, parallel, trainable=True)
        ddp, optimizer = training.prepare(loaded, optimizer="sgd", lr=1.0, distributed_optimizer=False)
        _, norms[name] = training.train_step(loaded, ddp, optimizer)
        export_hf(loaded.module, loaded.hf, f"{out}/{layout}/{name}")
    return norms


def _reference_gradient(path: str) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
    tokens = training.samples(model.config.vocab_size).flatten(0, 1)
    logits = model(tokens[:, :-1]).logits
    padding = logits.new_zeros(*logits.shape[:2], 512 - logits.shape[2])
    # The tests' loss counts the zero logits of the padded vocabulary, so the reference does.
    log_probs = torch.cat([logits, padding], dim=-1).log_softmax(-1)
    (-log_probs.gather(-1, tokens[:, 1:, None]).mean()).backward()
    return per_expert({name: weight.grad for name, weight in model.named_parameters()})


def _trained_here(name: str, sizes: harness.Layout) -> bool:
    if "moe" in name:
        return sizes.get("tensor_model_parallel_size", 1) == 1 or "sequence_parallel" in sizes
    return not any(size.startswith("expert") for size in sizes)


def test_one_sgd_step_moves_every_tensor_by_its_gradient(pool, models, tmp_path):
    gradients = {name: _reference_gradient(path) for name, path in models.items()}
    for layout, sizes in harness.LAYOUTS.items():
        chosen = {name: path for name, path in models.items() if _trained_here(name, sizes)}
        norms = pool(4).run(_sgd_step, chosen, layout, str(tmp_path))
        for name, path in chosen.items():
            before = load_file(Path(path) / "model.safetensors")
            after = load_file(tmp_path / layout / name / "model.safetensors")
            assert before.keys() == after.keys() == gradients[name].keys()
            for tensor, gradient in gradients[name].items():
                moved = (before[tensor].double() - after[tensor].double()).flatten()
                error = (moved - gradient.flatten()).norm() / gradient.norm()
                assert error < 1e-3, (layout, name, tensor, float(error))
            norm = torch.stack([gradient.norm() for gradient in gradients[name].values()]).norm()
            assert all(abs(rank[name] / norm - 1) < 1e-4 for rank in norms), (layout, name)


def _train_experts_without_sequence_parallelism(path: str) -> None:
    parallel = harness.start("TP2")
    with pytest.raises(ConfigError, match="trains them with --sequence-parallel only"):
        harness.load(path, parallel, trainable=True)


def test_experts_need_sequence_parallelism_to_train(pool, models):
    pool(4).run(_train_experts_without_sequence_parallelism, models["qwen3_moe"])


def _losses(path: str, layout: str, dtype: str, steps: int, distributed_optimizer: bool) -> list[float] | None:
    parallel = harness.start(layout)
    loaded = harness.load(path, parallel, trainable=True, params_dtype=getattr(torch, dtype))
    ddp, optimizer = training.prepare(
        loaded, optimizer="adam", lr=1e-3, distributed_optimizer=distributed_optimizer, clip_grad=1.0
    )
    losses = []
    for _ in range(steps):
        loss, _ = training.train_step(loaded, ddp, optimizer)
        losses.append(loss)
    return None if None in losses else losses


def test_losses_do_not_depend_on_layout_or_optimizer_sharding(pool, models):
    path = models["qwen3-tied"]
    for dtype, tolerance, layouts in (
        ("float32", 1e-4, ("TP2-PP2-SP",)),
        ("bfloat16", 2e-2, ("TP2-PP2-SP", "PP2")),
    ):
        (reference,) = pool(1).run(_losses, path, "TP1", dtype, 5, False)
        assert reference[-1] < reference[0] - 2.0
        for layout in layouts:
            answers = [a for a in pool(4).run(_losses, path, layout, dtype, 5, True) if a is not None]
            # Each replica saw its own micro-batches; their mean is the loss of the global batch.
            found = torch.tensor(sorted({tuple(answer) for answer in answers})).mean(0)
            error = (found - torch.tensor(reference)).abs().max()
            assert error < tolerance, (layout, dtype, found, reference)
