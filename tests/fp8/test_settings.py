"""FP8 of the layers: what the flags turn into, and what is refused before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_taopd import cli
from megatron_taopd.config import TrainConfig
from megatron_taopd.errors import ConfigError
from megatron_taopd.fp8_config import Fp8Config, Fp8Settings, ScoreHeadConfig, TeacherFp8Config
from megatron_taopd.fp8_support import Fp8Support
from megatron_taopd.models import fp8 as models_fp8
from megatron_taopd.models import fp8_fields, load_hf_config
from megatron_taopd.platform.layout import ParallelConfig, TeacherLayout
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.oracle.cases import make_pair, make_rollouts

HOPPER = Fp8Support(transformer_engine="2.11.0", gpus=(("H100", (9, 0)),), cuda="13.0")
BLACKWELL = Fp8Support(transformer_engine="2.11.0", gpus=(("B200", (10, 0)),), cuda="13.0")


def parsed(*words: str) -> TrainConfig:
    return cli.parse(TrainConfig, ["--student=s", "--teacher=t", "--prompt-data=p", *words], name="train")


@pytest.mark.parametrize(
    ("words", "student", "teacher"),
    [
        ((), None, None),
        (("--fp8-format=hybrid",), {"fp8": "hybrid", "fp8_recipe": "tensorwise"}, None),
        (("--teacher-fp8-format=e4m3",), None, {"fp8": "e4m3", "fp8_recipe": "tensorwise"}),
        (
            (
                "--fp8-format=hybrid",
                "--fp8-recipe=delayed",
                "--fp8-margin=1",
                "--fp8-amax-history-len=16",
                "--fp8-amax-compute-algo=max",
                "--no-fp8-wgrad",
                "--teacher-fp8-format=e4m3",
                "--teacher-fp8-recipe=blockwise",
                "--teacher-fp8-param-gather",
            ),
            {
                "fp8": "hybrid",
                "fp8_recipe": "delayed",
                "fp8_margin": 1,
                "fp8_amax_history_len": 16,
                "fp8_amax_compute_algo": "max",
                "fp8_wgrad": False,
            },
            {"fp8": "e4m3", "fp8_recipe": "blockwise", "fp8_param": True},
        ),
        (
            (
                "--fp8-format=e4m3",
                "--fp8-recipe=mxfp8",
                "--first-last-layers-bf16",
                "--num-layers-at-end-in-bf16=2",
                "--teacher-fp8-format=e4m3",
                "--teacher-first-last-layers-bf16",
                "--teacher-num-layers-at-start-in-bf16=0",
            ),
            {
                "fp8": "e4m3",
                "fp8_recipe": "mxfp8",
                "first_last_layers_bf16": True,
                "num_layers_at_end_in_bf16": 2,
            },
            {
                "fp8": "e4m3",
                "fp8_recipe": "tensorwise",
                "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": 0,
            },
        ),
    ],
)
def test_flags_become_fields_of_megatron(
    words: tuple[str, ...], student: dict[str, Any] | None, teacher: dict[str, Any] | None
) -> None:
    config = parsed(*words)
    for settings, want in ((config.precision.fp8_settings(), student), (config.teacher_fp8.fp8_settings(), teacher)):
        assert (None if settings is None else settings.transformer_fields()) == want


REFUSED = {
    "recipe alone": ({"fp8_recipe": "tensorwise"}, "--fp8-recipe tensorwise has no effect without --fp8-format"),
    "margin alone": ({"fp8_margin": 2}, "--fp8-margin 2 has no effect without --fp8-format"),
    "gather alone": ({"fp8_param_gather": True}, "--fp8-param-gather has no effect without --fp8-format"),
    "no wgrad alone": ({"fp8_wgrad": False}, "--no-fp8-wgrad has no effect without --fp8-format"),
    "bf16 layers alone": ({"first_last_layers_bf16": True}, "--first-last-layers-bf16 has no effect without"),
    "history of current scales": (
        {"fp8_format": "e4m3", "fp8_amax_history_len": 4},
        "--fp8-amax-history-len 4 has no effect with --fp8-recipe tensorwise",
    ),
    "margin of blocks": (
        {"fp8_format": "e4m3", "fp8_recipe": "mxfp8", "fp8_margin": 0},
        "--fp8-margin 0 has no effect with --fp8-recipe mxfp8",
    ),
    "wgrad of current scales": ({"fp8_format": "e4m3", "fp8_wgrad": False}, "--no-fp8-wgrad has no effect with"),
    "first and last with delayed": (
        {"fp8_format": "e4m3", "fp8_recipe": "delayed", "first_last_layers_bf16": True},
        "--first-last-layers-bf16 cannot be combined with --fp8-recipe delayed",
    ),
    "count without first and last": (
        {"fp8_format": "e4m3", "num_layers_at_start_in_bf16": 2},
        "--num-layers-at-start-in-bf16 2 has no effect without --first-last-layers-bf16",
    ),
    "negative count": (
        {"fp8_format": "e4m3", "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": -1},
        "--num-layers-at-end-in-bf16 -1 must not be negative",
    ),
    "no history": (
        {"fp8_format": "e4m3", "fp8_recipe": "delayed", "fp8_amax_history_len": 0},
        "--fp8-amax-history-len 0 must be at least 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_contradict(name: str) -> None:
    fields, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        Fp8Config(**fields)
    of_teacher = {f"teacher_{field}": value for field, value in fields.items()}
    if set(of_teacher) <= set(TeacherFp8Config.__dataclass_fields__):
        with pytest.raises(ConfigError, match=message.replace("--", "--teacher-")):
            TeacherFp8Config(**of_teacher)


def test_a_teacher_has_no_history() -> None:
    with pytest.raises(ConfigError, match="--teacher-fp8-recipe delayed scales by the maxima of earlier passes"):
        TeacherFp8Config(teacher_fp8_format="e4m3", teacher_fp8_recipe="delayed")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("--fp8-format=e4m3", "--fp8-param-gather"), ("--fp8-param-gather", "--use-distributed-optimizer")),
        (
            ("--fp8-format=e4m3", "--fp8-recipe=mxfp8", "--fp8-param-gather", "--use-distributed-optimizer"),
            ("--fp8-param-gather", "mxfp8"),
        ),
        (
            ("--teacher-fp8-format=e4m3", "--teacher-fp8-param-gather", "--offload-teacher"),
            ("--offload-teacher", "--teacher-fp8-param-gather"),
        ),
        (
            ("--fp8-format=hybrid", "--score-from=rollout"),
            ("--score-from rollout", "--fp8-format hybrid", "generates without FP8", "use --score-from forward"),
        ),
        (("--score-head-stages=1",), ("--score-head-stages 1 has no effect", "--score-head-precision fp8")),
        (("--fp8-format=e5m2",), ("--fp8-format", "e4m3", "hybrid")),
    ],
)
def test_flags_that_do_not_go_together(
    words: tuple[str, ...], wanted: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        parsed(*words)
    except ConfigError as error:
        message = str(error)
    except SystemExit:
        message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    else:
        pytest.fail("nothing was refused")
    for word in wanted:
        assert word in message


def test_hidden_states_of_the_rollout_beside_fp8_elsewhere() -> None:
    """Only the student's own layers in training differ from those that generate."""
    words = ("--score-from=rollout", "--teacher-fp8-format=e4m3", "--score-head-precision=fp8")
    assert parsed(*words).scoring.score_from == "rollout"


def test_the_loss_is_weighed_by_exact_log_probabilities(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--student=s", "--teacher=t", "--rollout-engine=file", "--rollout-data=r", "--importance-ratio=token"]
    cli.parse(TrainConfig, words, name="train")
    with pytest.raises((ConfigError, SystemExit)) as refusal:
        cli.parse(TrainConfig, [*words, "--score-head-precision=fp8"], name="train")
    said = " ".join(f"{refusal.value} {capsys.readouterr().err}".replace("│", " ").split())
    assert "--importance-ratio token weighs losses" in said and "--score-head-precision fp8" in said


def test_stages_of_the_head() -> None:
    assert ScoreHeadConfig().stages == 0
    assert ScoreHeadConfig(score_head_precision="fp8").stages == 2
    assert ScoreHeadConfig(score_head_precision="fp8", score_head_stages=1).stages == 1


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose matrices FP8 can multiply, one whose ffn (40) it cannot, one with experts of 24."""
    root = tmp_path_factory.mktemp("models")
    save_tiny_hf_model(root / "good", "qwen3", ffn_size=96)
    save_tiny_hf_model(root / "odd", "qwen3", ffn_size=40)
    save_tiny_hf_model(root / "experts", "qwen3_moe", expert_ffn_size=24)
    return root


def settings(recipe: str = "tensorwise", **fields: Any) -> Fp8Settings:
    found = Fp8Config(fp8_format="e4m3", fp8_recipe=recipe, **fields).fp8_settings()
    assert found is not None
    return found


def test_matrices_must_have_sides_of_16(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_fp8, "find_fp8_support", lambda: BLACKWELL)
    good, odd, experts = (load_hf_config(models / name) for name in ("good", "odd", "experts"))
    one, two, four = (ParallelConfig(tensor_model_parallel_size=size) for size in (1, 2, 4))
    assert fp8_fields(settings(), good, two, trained=True) == {"fp8": "e4m3", "fp8_recipe": "tensorwise"}
    assert fp8_fields(None, odd, one, trained=True) == {}
    # 2 * 40 outputs are a multiple of 16, 40 inputs are not.
    with pytest.raises(ConfigError, match=r"multiples of 16 .*linear_fc2 of .*odd has 40 inputs a rank"):
        fp8_fields(settings(), odd, one, trained=True)
    with pytest.raises(
        ConfigError, match=r"linear_fc2 of .*good has 24 inputs a rank at --tensor-model-parallel-size 4"
    ):
        fp8_fields(settings(), good, four, trained=True)
    with pytest.raises(ConfigError, match=r"multiples of 32 .*has 48 inputs a rank at --teacher-tensor-model"):
        teacher = TeacherFp8Config(teacher_fp8_format="e4m3", teacher_fp8_recipe="mxfp8").fp8_settings()
        fp8_fields(teacher, good, TeacherLayout(tensor_model_parallel_size=2), trained=False)
    with pytest.raises(ConfigError, match=r"linear_fc2 of an expert of .*experts has 24 inputs"):
        fp8_fields(settings(), experts, one, trained=True)


def test_bf16_layers_fit_in_a_stage(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As megatron-core has it; of 4 layers two stages have 2 each."""
    monkeypatch.setattr(models_fp8, "find_fp8_support", lambda: HOPPER)
    good, stages = load_hf_config(models / "good"), ParallelConfig(pipeline_model_parallel_size=2)
    three = settings(first_last_layers_bf16=True, num_layers_at_end_in_bf16=3)
    with pytest.raises(ConfigError, match="--num-layers-at-end-in-bf16 3 is more than the 2 layers of a stage"):
        fp8_fields(three, good, stages, trained=True)
    assert fp8_fields(three, good, ParallelConfig(), trained=True)["num_layers_at_end_in_bf16"] == 3


@pytest.mark.parametrize(
    ("support", "recipe", "wanted"),
    [
        (Fp8Support(transformer_engine=None), "tensorwise", "there is no CUDA device"),
        (
            Fp8Support(transformer_engine="2.11.0", gpus=(("A100", (8, 0)),)),
            "tensorwise",
            "A100 has compute.*8.0 and 8.9",
        ),
        (Fp8Support(transformer_engine=None, gpus=HOPPER.gpus), "tensorwise", "Transformer Engine is missing"),
        (Fp8Support(transformer_engine="2.1.0", gpus=HOPPER.gpus), "tensorwise", "2.1.0 is older than 2.2"),
        (HOPPER, "mxfp8", "H100 has compute capability 9.0 and 10.0 is needed"),
        (Fp8Support(transformer_engine="2.11.0", gpus=(("L4", (8, 9)),), cuda="13.0"), "blockwise", "8.9 and 9.0"),
    ],
)
def test_what_the_machine_lacks(
    models: Path, monkeypatch: pytest.MonkeyPatch, support: Fp8Support, recipe: str, wanted: str
) -> None:
    monkeypatch.setattr(models_fp8, "find_fp8_support", lambda: support)
    with pytest.raises(ConfigError, match=f"--fp8-format e4m3 needs FP8 layers.*{wanted}.*taopd doctor"):
        fp8_fields(settings(recipe), load_hf_config(models / "good"), ParallelConfig(), trained=True)


def test_a_model_that_is_only_read_is_not_scaled_by_history(models: Path) -> None:
    with pytest.raises(ConfigError, match="--fp8-recipe delayed scales by the maxima of earlier passes"):
        fp8_fields(settings("delayed"), load_hf_config(models / "good"), ParallelConfig(), trained=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    make_pair(root, "qwen3")
    make_rollouts(root / "rollouts.jsonl")
    return root


@pytest.mark.parametrize("flag", ["--fp8-format=e4m3", "--teacher-fp8-format=e4m3"])
@pytest.mark.parametrize("name", ["train", "score"])
def test_commands_refuse_before_a_model_is_loaded(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, flag: str
) -> None:
    """Megatron without Transformer Engine would take the setting and compute without FP8."""
    monkeypatch.setattr("megatron_taopd.training.pair.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    words = [name, f"--student={pair / 'student'}", f"--teacher={pair / 'teacher'}", flag]
    words.append(f"--rollout-data={pair / 'rollouts.jsonl'}")
    words += ["--rollout-engine=file"] if name == "train" else [f"--output={tmp_path / 'scores.jsonl'}"]
    with pytest.raises(ConfigError, match=rf"{flag.replace('=', ' ')} needs FP8 layers of Transformer Engine"):
        cli.run(words)
    assert not (tmp_path / "scores.jsonl").exists()
