"""Public model sizes and the recipes over them: numbers that must hold, and flags and layouts that must be accepted."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from megatron_taopd.cli import parse
from megatron_taopd.config import TrainConfig
from megatron_taopd.models import load_hf_config, refuse_expert_layout_in_vain
from megatron_taopd.models.hf_config import HFModelConfig
from megatron_taopd.models.parameter_count import count_parameters
from megatron_taopd.models.transformer_config import check_layout
from megatron_taopd.platform.layout import ParallelConfig
from tests.conftest import ROOT

MODELS = ROOT / "examples/models"
CONFIGS = sorted(path.parent.name for path in MODELS.glob("configs/*/config.json"))
RECIPES = sorted(path.name for path in MODELS.glob("*.sh") if path.name != "common.sh")

# As the index files and model cards of the published weights give them, not computed here.
PUBLISHED = {
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3.1_8b": 8_030_261_248,
    "llama3.1_70b": 70_553_706_496,
    "llama3.2_1b": 1_235_814_400,
    "llama3.2_3b": 3_212_749_824,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_1.5b": 1_543_714_304,
    "qwen2.5_3b": 3_085_938_688,
    "qwen2.5_7b": 7_615_616_512,
    "qwen2.5_14b": 14_770_033_664,
    "qwen2.5_32b": 32_763_876_352,
    "qwen2.5_72b": 72_706_203_648,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
}
GIB = 2**30


def _config(name: str) -> HFModelConfig:
    return load_hf_config(MODELS / "configs" / name)


def test_every_size_has_its_published_count() -> None:
    assert {name: count_parameters(_config(name)).total for name in CONFIGS} == PUBLISHED


def test_active_parameters_of_the_mixtures() -> None:
    """A3B and A22B are in their names, rounded (the embedding is counted)."""
    assert count_parameters(_config("qwen3_30b_a3b")).active / 1e9 == pytest.approx(3.3, abs=0.06)
    assert count_parameters(_config("qwen3_235b_a22b")).active / 1e9 == pytest.approx(22, abs=0.3)
    dense = count_parameters(_config("qwen3_4b"))
    assert dense.active == dense.total


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_builds_the_same_count(name: str) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(MODELS / "configs" / name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == PUBLISHED[name]


def _words(recipe: str, *more: str) -> list[str]:
    """The command of a recipe, word by word."""
    script = MODELS / recipe
    subprocess.run(["bash", "-n", script], check=True)
    environment = {"PATH": "/usr/bin:/bin", "DRY_RUN": "1"}
    answer = subprocess.run(["bash", script, *more], env=environment, capture_output=True, text=True, check=True)
    return answer.stdout.splitlines()


def _flags(words: list[str]) -> TrainConfig:
    place = words.index("megatron_taopd")
    assert words[:1] == ["torchrun"] and words[place - 1 : place + 2] == ["-m", "megatron_taopd", "train"]
    return parse(TrainConfig, words[place + 2 :], name="train")


def _world_size(words: list[str]) -> int:
    return int(words[words.index("--nnodes") + 1]) * int(words[words.index("--nproc-per-node") + 1])


def _of_directory(directory: str) -> HFModelConfig:
    """Configuration of models/Qwen3-4B and its like."""
    name = Path(directory).name.lower().removesuffix("-instruct")
    return _config(name.replace("llama-", "llama").replace("-", "_"))


def _state_bytes(hf: HFModelConfig, parallel: ParallelConfig, world_size: int, *, trained: bool) -> float:
    """Weights of a rank in bf16; with ``trained`` fp32 gradients and a sharded fp32 Adam beside them."""
    count = count_parameters(hf)
    experts = sum(layer.experts for layer in count.layers)
    expert_ranks = parallel.expert_parallel_size if experts else parallel.model_parallel_size
    total = 0.0
    for parameters, ranks in ((count.total - experts, parallel.model_parallel_size), (experts, expert_ranks)):
        replicas = world_size / ranks
        total += parameters / ranks * (2 + (4 + 12 / replicas if trained else 0))
    return total


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str) -> None:
    words = _words(recipe)
    config, world_size = _flags(words), _world_size(words)
    student, teacher = _of_directory(config.models.student), _of_directory(config.models.teacher[0])
    parallel = config.parallel
    of_teacher = config.teacher_parallel.resolve(parallel) or parallel
    check_layout(student, parallel)
    check_layout(teacher, of_teacher)
    refuse_expert_layout_in_vain(parallel, student, teacher)
    for layout in (parallel, of_teacher):
        assert world_size % layout.model_parallel_size == 0 and world_size % layout.expert_parallel_size == 0
    replicas = world_size // parallel.model_parallel_size
    assert config.batch.global_batch_size % (replicas * config.batch.micro_batch_size) == 0
    held = _state_bytes(student, parallel, world_size, trained=True)
    held += _state_bytes(teacher, of_teacher, world_size, trained=False)
    assert held < 56 * GIB, f"{held / GIB:.1f} GiB of weights and state a GPU leave too little of 80 GB"


def test_every_size_but_llama_3_0_has_a_recipe() -> None:
    used = set()
    for recipe in RECIPES:
        words = _words(recipe)
        used |= {_of_directory(words[words.index(flag) + 1]).path.name for flag in ("--student", "--teacher")}
    assert used == set(CONFIGS) - {"llama3_8b", "llama3_70b"}  # the layouts of 3.1 are theirs


def test_words_and_variables_of_the_caller_win() -> None:
    config = _flags(_words(RECIPES[0], "--keep-ratio", "0.3", "--train-iters", "5"))
    assert (config.selection.keep_ratio, config.batch.train_iters) == (0.3, 5)
    words = subprocess.run(
        ["bash", MODELS / "qwen3_4b_from_32b.sh"],
        env={"PATH": "/usr/bin:/bin", "DRY_RUN": "1", "STUDENT": "a", "TEACHER": "b", "NODES": "2", "OUTPUT": "out"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    config = _flags(words)
    assert (config.models.student, config.models.teacher, config.checkpoint.save) == ("a", ["b"], "out/checkpoints")
    assert _world_size(words) == 16
