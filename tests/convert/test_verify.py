"""``taopd convert verify`` passes a right conversion and says what is wrong with another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_taopd.cli import run
from megatron_taopd.commands.common import ranks
from megatron_taopd.convert.to_megatron import convert_to_megatron
from megatron_taopd.convert.verify import verify_model
from megatron_taopd.errors import TaopdError
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.convert.models import save_models
from tests.data.tokenizers_for_tests import save_word_tokenizer

Q = "model.layers.1.self_attn.q_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"
pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor:FutureWarning")  # megatron-core's loader

O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture()
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Process groups of one rank in the tests' own process."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with ranks(ParallelConfig(), seed=0):
        yield


def _verify(original: Path, model: Path) -> tuple[bool, str, float]:
    """Passed, report or error, largest difference."""
    try:
        verdict = verify_model(original, model, max_tokens=96)
    except TaopdError as error:
        return False, str(error), float("nan")
    return verdict.passed, verdict.report(), verdict.max_difference


def test_right_conversions_pass(one_process, tmp_path) -> None:
    paths = save_models(tmp_path / "hf")
    for name, path in paths.items():
        passed, report, difference = _verify(path, convert_to_megatron(path, tmp_path / "megatron" / name))
        assert passed, report
        assert difference < 2e-5, (name, difference)
        assert "top-1 agreement ... 100.00%" in report and "settings: the same" in report
        assert report.endswith("PASSED")
        assert "tensors: all" in report


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    found = load_file(path / "model.safetensors")
    change(found)
    save_file(found, path / "model.safetensors", metadata={"format": "pt"})


def _swap_q_and_k(path: Path) -> None:
    _edit(path, lambda t: t.update({Q: t[K], K: t[Q]}))


def _transpose(path: Path) -> None:
    _edit(path, lambda t: t.update({O_PROJ: t[O_PROJ].T.contiguous()}))


def _interleave(path: Path) -> None:
    """The rows of a head as models with rotary pairs side by side have them."""
    _edit(path, lambda t: t.update({Q: t[Q].view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64).contiguous()}))


def _config(**settings: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def _nan_free_noise(path: Path) -> None:
    _edit(path, lambda t: t[O_PROJ].view(-1)[::97].add_(0.5))


WRONG: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "swapped q and k": (
        _swap_q_and_k,
        ("2 of 21 differ", f"it holds the original's {K}", f"it holds the original's {Q}", f"look at {Q}"),
    ),
    "transposed": (_transpose, ("1 of 21 differ", f"look at {O_PROJ}", "it is the transpose of the original")),
    "interleaved": (_interleave, ("1 of 21 differ", f"{Q}: ", "rows of the original in another order")),
    "noise": (_nan_free_noise, (f"{O_PROJ}: 1.05% of the values differ, by up to 0.5",)),
    "rope base": (
        _config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        ("all 21 equal", "rope_theta is 1000000.0 in", "and 10000.0 in the original", "FAILED: logits differ"),
    ),
    "epsilon": (_config(rms_norm_eps=1e-2), ("rms_norm_eps is 0.01 in",)),
}


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_planted_mistakes_are_caught_and_named(one_process, tmp_path, kind) -> None:
    original = save_tiny_hf_model(tmp_path / "original", "llama", num_layers=2, num_kv_heads=4)
    for name, (change, texts) in WRONG.items():
        wrong = Path(shutil.copytree(original, tmp_path / name))
        change(wrong)
        model = wrong if kind == "hf" else convert_to_megatron(wrong, tmp_path / f"{name} megatron")
        passed, report, difference = _verify(original, model)
        assert not passed and difference > 1e-3, (name, report)
        for text in texts:
            assert text in report, (name, text, report)
        assert ("the stored argument rotary_base is 1000000.0" in report) == (kind == "megatron" and "rope" in name)


def _spoil_rows_not_read(path: Path) -> None:
    """Of the embedding, those that no prompt of four tokens reads."""
    read = torch.randint(509, (4,), generator=torch.Generator().manual_seed(0))
    spared = torch.ones(509, dtype=torch.bool).index_fill(0, read, False)
    _edit(path, lambda t: t["model.embed_tokens.weight"].masked_fill_(spared[:, None], 7.0))


EXPERT = "model.layers.1.mlp.experts.{}.down_proj.weight"


def _spoil_experts_not_visited(path: Path) -> None:
    """Four tokens visit eight of the 24 experts at most."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    read = torch.randint(509, (1, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        visited = model(read, output_router_logits=True).router_logits[1].topk(2).indices.unique().tolist()
    assert 2 <= len(visited) <= 8
    _edit(path, lambda t: [t[EXPERT.format(e)].fill_(7.0) for e in range(24) if e not in visited])


@pytest.mark.parametrize("kind", ["hf", "megatron"])
@pytest.mark.parametrize("spoil", [_spoil_rows_not_read, _spoil_experts_not_visited])
def test_mistakes_that_no_prompt_shows(one_process, tmp_path, kind: str, spoil: Callable[[Path], None]) -> None:
    family, settings = ("llama", {}) if spoil is _spoil_rows_not_read else ("qwen3_moe", {"num_experts": 24})
    original = save_tiny_hf_model(tmp_path / "original", family, num_layers=2, tied=False, **settings)
    model = Path(shutil.copytree(original, tmp_path / "wrong"))
    spoil(model)
    if kind == "megatron":
        model = convert_to_megatron(model, tmp_path / "megatron")
    verdict = verify_model(original, model, max_tokens=4)
    assert verdict.logits_agree and verdict.max_difference < 2e-5 and not verdict.passed
    name = "embed_tokens.weight: 99" if family == "llama" else ".down_proj.weight: 100"
    assert name in verdict.report() and "FAILED" in verdict.report()
    assert f"{len(verdict.tensors)} of {verdict.num_tensors} tensors are not the original's" in verdict.report()
    verdict.allow_tensor_differences = True
    assert verdict.passed and "differ, which --allow-tensor-differences allows" in verdict.report()


def test_types_round_and_do_not_differ(one_process, tmp_path) -> None:
    original = save_tiny_hf_model(tmp_path / "original", "qwen3", num_layers=1)
    made = convert_to_megatron(original, tmp_path / "megatron", dtype=torch.bfloat16)
    verdict = verify_model(original, made, max_tokens=8, tolerance=1.0)
    assert verdict.passed and not verdict.tensors and verdict.max_difference > 1e-3


def test_a_checkpoint_without_a_configuration(one_process, tmp_path) -> None:
    original = save_tiny_hf_model(tmp_path / "original", "qwen2", num_layers=2)
    made = convert_to_megatron(original, tmp_path / "megatron")
    shutil.rmtree(made / "release" / "hf")
    verdict = verify_model(original, made, max_tokens=8)
    assert verdict.passed, verdict.report()
    assert "settings: the same (the checkpoint has no hf/config.json: the original's was taken)" in verdict.report()


def test_what_cannot_be_compared(one_process, tmp_path) -> None:
    original = save_tiny_hf_model(tmp_path / "original", "qwen3", num_layers=2, head_dim=32)
    shallow = save_tiny_hf_model(tmp_path / "shallow", "qwen3", num_layers=1, head_dim=32)
    missing = Path(shutil.copytree(original, tmp_path / "missing"))
    _edit(missing, lambda t: t.pop(Q))
    assert "no tensor 'model.layers.1" in _verify(original, shallow)[1]
    assert f"missing has no tensor '{Q}'" in _verify(original, missing)[1] == _verify(missing, original)[1]
    assert "must be a Hugging Face directory" in _verify(convert_to_megatron(original, tmp_path / "m"), original)[1]


def _command(original: str, model: str, prompts: str, tolerance: str, *more: str) -> int:
    words = ["--hf", original, "--model", model, "--prompts", prompts, "--tolerance", tolerance, *more]
    return run(["convert", "verify", *words])


def test_given_prompts_and_exit_status(tmp_path, monkeypatch, capsys) -> None:
    original = save_tiny_hf_model(tmp_path / "original", "llama", num_layers=1)
    save_word_tokenizer(original, [f"w{number}" for number in range(400)])
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "w1 w2 w3 w4"}, {"prompt_tokens": [5, 6, 7]}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = (str(original), str(convert_to_megatron(original, tmp_path / "made")), str(prompts))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert _command(*words, "1e-3") == 0
    assert "2 prompts, 7 positions, float32" in capsys.readouterr().out
    assert _command(*words, "1e-12") == 1
    assert "the two models compute differently, or float32 is too coarse" in capsys.readouterr().out
    _edit(original, lambda t: t["model.embed_tokens.weight"][40:].add_(1.0))
    assert _command(*words, "1e-3") == 1
    assert "1 of 12 tensors are not the original's, though these prompts" in capsys.readouterr().out
    assert _command(*words, "1e-3", "--allow-tensor-differences") == 0
    assert _command(*words, "1e-3", "--no-tensors") == 0
