"""``taopd plan`` as its user calls it, on the public configurations."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from megatron_taopd import cli
from megatron_taopd.errors import ConfigError
from megatron_taopd.models import load_hf_config
from megatron_taopd.plan.config import PlanConfig
from megatron_taopd.plan.memory import padded_vocab
from megatron_taopd.plan.parameters import rank_parameters, stage_layers
from megatron_taopd.plan.planning import make_plan
from megatron_taopd.platform.layout import ParallelConfig
from tests.examples.test_models import PUBLISHED

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "models" / "configs"
PAIR = (f"--student={CONFIGS / 'qwen3_4b'}", f"--teacher={CONFIGS / 'qwen3_32b'}")


@pytest.mark.parametrize("name", PUBLISHED)
def test_stages_together_hold_the_published_count(name: str) -> None:
    hf = load_hf_config(CONFIGS / name)
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    padded = padded_vocab(hf, tensor=1)
    stages = [rank_parameters(hf, parallel, stage=stage, padded_vocab_size=padded) for stage in range(2)]
    outside = sum(stage.vocabulary for stage in stages)
    assert sum(stage.total for stage in stages) - outside == PUBLISHED[name] - (1 if hf.tied else 2) * (
        hf.vocab_size * hf.hidden_size
    )


def test_stages_have_every_layer_once() -> None:
    hf = load_hf_config(CONFIGS / "qwen3_4b")
    for parallel in (
        ParallelConfig(pipeline_model_parallel_size=4),
        ParallelConfig(pipeline_model_parallel_size=4, num_virtual_stages_per_pipeline_rank=3),
        ParallelConfig(pipeline_model_parallel_size=4, decoder_first_pipeline_num_layers=6),
        ParallelConfig(
            pipeline_model_parallel_size=3, decoder_first_pipeline_num_layers=10, decoder_last_pipeline_num_layers=6
        ),
        ParallelConfig(
            pipeline_model_parallel_size=19,
            account_for_embedding_in_pipeline_split=True,
            account_for_loss_in_pipeline_split=True,
        ),
        ParallelConfig(
            pipeline_model_parallel_size=2,
            num_virtual_stages_per_pipeline_rank=19,
            account_for_embedding_in_pipeline_split=True,
            account_for_loss_in_pipeline_split=True,
        ),
        ParallelConfig(
            pipeline_model_parallel_size=2,
            num_virtual_stages_per_pipeline_rank=2,
            decoder_first_pipeline_num_layers=16,
        ),
    ):
        stages = parallel.pipeline_model_parallel_size
        dealt = [layer for stage in range(stages) for layer in stage_layers(hf, parallel, stage)]
        assert sorted(dealt) == list(range(36))


def test_a_plan_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    words = ["--tensor-model-parallel-size=4", "--sequence-parallel", "--bf16", "--use-distributed-optimizer"]
    assert cli.run(["plan", *PAIR, *words, f"--json={file}"]) == 0
    assert "It fits" in capsys.readouterr().out
    (plan,) = json.loads(file.read_text())
    (stage,) = plan["stages"]
    rows = 64 // 2 * 4096
    assert stage["parameters"] == pytest.approx(4.022e9 / 4 * 2, rel=0.01)
    assert stage["gradients"] == 2 * stage["parameters"]
    assert stage["optimizer"] == pytest.approx(12 / 2 / 2 * stage["parameters"], rel=1e-6)
    assert stage["teacher"] == pytest.approx(32.76e9 / 4 * 2, rel=0.01)
    assert stage["teacher_hidden"] == rows * 5120 * 2
    assert stage["logits_not_held"] == 2 * rows * (152064 // 4) * 4
    # 2 x 36 layers x 2 of 8 key-value heads of 128 x 2 bytes, 32 responses of 4608 tokens; the last is not read
    assert stage["kv_cache"] == 2 * 36 * 2 * 128 * 2 * 32 * 4607
    traffic = {(t["phase"], t["kind"]): t for t in plan["traffic"]}
    assert traffic["score", "statistics of the rows (TP)"]["num_bytes"] == 3 * 4 * (6 * 16 + 10) * rows
    # Hidden states of width 2560 and 5120 in bf16, of which three of four parts come from other ranks.
    for who, width in (("student", 2560), ("teacher", 5120)):
        assert traffic["score", f"{who} response rows (TP, SP)"]["num_bytes"] == rows * width * 2 * 3 / 4
    # Half of (4 bytes of gradient down, 2 of weight up) goes to the other of two replicas
    assert traffic["train", "gradients (DP)"]["num_bytes"] == pytest.approx(stage["parameters"] / 2 * 6 / 2)


def test_layouts_are_proposed_or_it_is_said_what_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plans.json"
    assert cli.run(["plan", *PAIR, "--bf16", "--propose", f"--json={file}"]) == 0
    plans = json.loads(file.read_text())
    fitting = [plan for plan in plans if plan["fits"]]
    assert fitting == plans[: len(fitting)]
    assert [plan["seconds"] for plan in fitting] == sorted(plan["seconds"] for plan in fitting)
    assert all((plan["peak_bytes"] <= plan["room_bytes"]) == plan["fits"] for plan in plans)
    capsys.readouterr()
    assert cli.run(["plan", *PAIR, "--propose", "--gpu-memory-gib=10", f"--json={file}"]) == 1
    told = capsys.readouterr().out
    assert "No layout fits" in told
    assert "still missing" in told
    capsys.readouterr()
    words = ["--tensor-model-parallel-size=4", "--sequence-parallel", "--gpu-memory-gib=45"]
    assert cli.run(["plan", *PAIR, *words]) == 1
    flags = capsys.readouterr().out.rsplit("it fits with ", 1)[1].split()
    assert "--bf16" in flags
    assert cli.run(["plan", *PAIR, *words, *flags]) == 0


def test_what_is_said_to_help_helps() -> None:
    student, teacher = load_hf_config(CONFIGS / "qwen3_4b"), load_hf_config(CONFIGS / "qwen3_32b")

    def peak(**settings: object) -> int:
        layout = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
        config = PlanConfig(student=str(student.path), teacher=str(teacher.path), parallel=layout, **settings)  # type: ignore[arg-type]
        return make_plan(config, student, teacher).peak

    plain = peak(bf16=True)
    assert peak() > plain
    assert peak(bf16=True, use_distributed_optimizer=True) < plain
    assert peak(bf16=True, offload_teacher=True) < plain
    assert peak(bf16=True, teacher_dtype="fp8") < plain
    assert peak(bf16=True, score_head_precision="fp8") > plain


def test_nothing_is_advised_that_train_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that are stored in FP8 cannot be offloaded; a flag that is given need not be given again."""
    words = ["--gpu-memory-gib=20", "--bf16", "--tensor-model-parallel-size=4", "--sequence-parallel"]
    assert cli.run(["plan", *PAIR, *words]) == 1
    told = capsys.readouterr().out
    assert "--offload-teacher saves" in told and "--bf16" not in told
    assert cli.run(["plan", *PAIR, *words, "--teacher-dtype=fp8"]) == 1
    told = capsys.readouterr().out.replace("--offload-teacher-hidden", "")
    assert "--use-distributed-optimizer saves" in told and "--offload-teacher" not in told


def test_the_table_of_the_page_is_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row, of a pair whose quickest layout is a close call; ``python tools/plan_table.py --write`` makes all."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    plan_table = importlib.import_module("plan_table")
    text = plan_table.PAGE.read_text(encoding="utf-8")
    assert plan_table.HEADER + "| qwen3_4b | qwen3_32b | 8 |" in text
    assert plan_table.row("qwen3_8b", "qwen3_235b_a22b", 128) in text
    for student, teacher, num_gpus in plan_table.ROWS:
        assert f"\n| {student} | {teacher} | {num_gpus} |" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--propose", "--tensor-model-parallel-size=2"], "no effect"),
        (["--tensor-model-parallel-size=3"], "ranks cannot hold"),
        (["--num-gpus=12", "--tensor-model-parallel-size=3", "--global-batch-size=12"], "does not divide"),
        (["--global-batch-size=63"], "must be a multiple"),
        (["--gpu=a100-80gb", "--teacher-dtype=fp8"], "no FP8"),
        (["--teacher-dtype=fp8", "--offload-teacher"], "--teacher-fp8-param-gather of `train`"),
        (["--gpu=a100-80gb", "--score-head-precision=fp8"], "no FP8"),
        (["--expert-model-parallel-size=2"], "no effect"),
        (["--json=/nowhere/at/all.json"], "no directory"),
    ],
)
def test_refusals(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ConfigError, SystemExit)) as refused:
        cli.run(["plan", *PAIR, *words])
    told = str(refused.value) + capsys.readouterr().err
    assert message in " ".join(told.replace("│", " ").split())
