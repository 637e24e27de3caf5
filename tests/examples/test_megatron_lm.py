"""TA-OPD in the training loop of megatron-core 0.19, held against our own loop."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from megatron.core.package_info import __version__ as megatron_version

from megatron_taopd.errors import ConfigError
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.conftest import ROOT

SCRIPT = ROOT / "examples/megatron_lm/pretrain_taopd.py"
OLD = tuple(int(part) for part in megatron_version.split(".")[:2]) < (0, 19)
needs_its_loop = pytest.mark.skipif(
    OLD, reason=f"pretrain() of this shape ships with megatron-core 0.19, here is {megatron_version}: make test-latest"
)
# Given to both loops.
BATCH = ["--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "3", "--seed", "1"]
OPTIMIZER = ["--lr", "1e-3", "--lr-decay-style", "constant", "--weight-decay", "0.01", "--adam-beta2", "0.99"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--bf16", "--use-distributed-optimizer"]
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random models and two recipes over them: recorded responses, and prompts to be answered."""
    path = tmp_path_factory.mktemp("recipes")
    student = save_tiny_hf_model(path / "student", "qwen3", num_layers=2, hidden_size=32, ffn_size=48, seed=1)
    teacher = save_tiny_hf_model(path / "teacher", "qwen3", num_layers=2, hidden_size=64, ffn_size=96, seed=2)
    draw = random.Random(0)

    def ids(shortest: int, longest: int) -> list[int]:
        return [draw.randrange(3, 500) for _ in range(draw.randint(shortest, longest))]

    rows = [{"prompt_tokens": ids(3, 8), "response_tokens": ids(4, 12)} for _ in range(8)]
    for name, keys in (("rollouts.jsonl", ("prompt_tokens", "response_tokens")), ("prompts.jsonl", ("prompt_tokens",))):
        lines = (json.dumps({key: row[key] for key in keys}) for row in rows)
        (path / name).write_text("\n".join(lines) + "\n")
    common = f"student: {student}\nteacher: {teacher}\nkeep-ratio: 0.5\nloss: forward_kl\n"
    (path / "file.yaml").write_text(f"{common}rollout-engine: file\nrollout-data: {path}/rollouts.jsonl\n")
    (path / "live.yaml").write_text(f"{common}prompt-data: {path}/prompts.jsonl\nmax-response-length: 8\n")
    return path


def _run(ranks: int, words: list[str]) -> str:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    answer = subprocess.run([*torchrun, *words], capture_output=True, text=True, env=dict(os.environ), timeout=400)
    assert answer.returncode == 0, answer.stdout[-2000:] + answer.stderr[-4000:]
    return answer.stdout


@needs_its_loop
@pytest.mark.parametrize(
    ("recipe", "ranks", "layout", "tolerance"),
    [("file", 1, [], 1e-5), ("live", 2, TP2 + RECOMPUTE, 1e-3)],
    ids=["fp32", "TP2-bf16"],
)
def test_both_loops_train_alike(
    recipes: Path, tmp_path: Path, recipe: str, ranks: int, layout: list[str], tolerance: float
) -> None:
    flags = [*BATCH, *OPTIMIZER, *layout]
    theirs = _run(
        ranks,
        [str(SCRIPT), "--taopd-config", f"{recipes}/{recipe}.yaml", *flags]
        + ["--seq-length", "32", "--log-interval", "1", "--distributed-backend", "gloo"],
    )
    words = ["-m", "megatron_taopd", "train", "--config", f"{recipes}/{recipe}.yaml", "--log-dir", str(tmp_path)]
    _run(ranks, [*words, *flags])
    ours = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in ours]
    # Megatron logs the first iteration and averages it into the second once more.
    losses[1] = (losses[0] + losses[1]) / 2
    assert _printed(theirs, "distillation loss") == pytest.approx(losses, rel=tolerance)
    norms = [step["grad_norm"] for step in ours]
    assert _printed(theirs, "grad norm") == pytest.approx(norms, abs=6e-4, rel=tolerance)  # three decimals are printed
    assert len(losses) == 3 and len(set(losses)) == 3


def _printed(output: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"\| {name}: (\S+)", output)]


def _arguments(recipe: Path, **changes: object) -> argparse.Namespace:
    values = dict(
        taopd_config=str(recipe),
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=None,
        sequence_parallel=False,
        micro_batch_size=1,
        global_batch_size=4,
        train_iters=2,
        seed=7,
        bf16=True,
        fp16=False,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        eval_interval=None,
        recompute_granularity=None,
        recompute_method=None,
        recompute_num_layers=None,
    )
    return argparse.Namespace(**(values | changes))


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("pretrain_taopd", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_what_the_recipe_may_say(recipes: Path, tmp_path: Path) -> None:
    script = _script()
    config = script.read_recipe(_arguments(recipes / "file.yaml"))
    assert (config.seed, config.batch.global_batch_size, config.precision.bf16) == (7, 4, True)
    assert config.selection.keep_ratio == 0.5
    with pytest.raises(ConfigError, match="--pipeline-model-parallel-size .*not in this loop"):
        script.read_recipe(_arguments(recipes / "file.yaml", pipeline_model_parallel_size=2))
    with pytest.raises(ConfigError, match="--overlap-grad-reduce"):
        script.read_recipe(_arguments(recipes / "file.yaml", overlap_grad_reduce=True))
    with pytest.raises(ConfigError, match="--fp8-format"):
        script.read_recipe(_arguments(recipes / "file.yaml", fp8="hybrid"))
    (tmp_path / "more.yaml").write_text((recipes / "file.yaml").read_text() + "lr: 0.1\nsave: here\n")
    with pytest.raises(ConfigError, match="lr, save: Megatron's own flags say that in this loop"):
        script.read_recipe(_arguments(tmp_path / "more.yaml"))


def test_flags_of_the_model_are_followed_or_refused(recipes: Path) -> None:
    script = _script()
    recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    args = _arguments(recipes / "file.yaml", **recompute)
    config = script.read_recipe(args)
    hf, built = script.load_hf_config(config.models.student), script.student_config(config)
    assert {name: getattr(built, name) for name in recompute} == recompute
    script.describe_model(args, set(recompute), hf, built)
    assert (args.num_layers, args.padded_vocab_size, args.num_experts) == (2, 512, None)
    for name, value in {
        "num_layers": 12,
        "attention_dropout": 0.1,
        "swiglu": False,
        "recompute_modules": ["mlp"],
    }.items():
        with pytest.raises(ConfigError, match=f"{name} = .* by Megatron's flags, and the student is built with"):
            script.describe_model(_arguments(recipes / "file.yaml", **{name: value}), {name}, hf, built)
    short = script.read_recipe(_arguments(recipes / "file.yaml", recompute_activations=True))
    assert short.recompute.recompute_granularity == "selective"
