"""What an HF ``config.json`` says about a model, checked against what this package can build."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_taopd.errors import ModelError
from megatron_taopd.models.source import hf_directory

# config.json's model_type -> (biases on q, k, v; norms on queries and keys)
FAMILIES: dict[str, tuple[bool, bool]] = {
    "qwen3": (False, True),
    "qwen3_moe": (False, True),
    "qwen2": (True, False),
    "llama": (False, False),
    "mistral": (False, False),
}
_ARCHITECTURES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
}
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The mixture of experts that takes the place of the ffn."""

    num_experts: int
    experts_per_token: int
    ffn_size: int
    """Inner size of one expert."""
    normalize: bool
    """The weights of a token's experts sum to 1; otherwise they are what the softmax over all experts gives them."""
    layers: tuple[bool, ...]
    """Whether each layer has experts; the others have one ffn of ``HFModelConfig.ffn_size``."""


@dataclass(frozen=True, kw_only=True)
class HFModelConfig:
    """A decoder-only model as its HF directory describes it."""

    family: str
    """Key of :data:`FAMILIES`."""
    vocab_size: int
    """Rows of the embedding in the file, before any padding of ours."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """None, or ``rope_type`` (linear, llama3) with its parameters."""
    tied: bool
    """The embedding is the LM head as well; the file then has no ``lm_head.weight``."""
    qkv_bias: bool
    qk_norm: bool
    experts: ExpertsConfig | None
    """None: every layer has one ffn."""
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    """Stop tokens: of generation_config.json, else of config.json, else none."""
    raw: dict[str, Any]
    """The whole config.json."""
    path: Path
    """The HF directory."""

    @property
    def all_heads_size(self) -> int:
        """Size of all heads side by side, the input of the attention's last matrix."""
        return self.num_heads * self.head_dim

    @property
    def num_experts(self) -> int:
        """Experts of a mixture; 0 if the model has none."""
        return 0 if self.experts is None else self.experts.num_experts

    @property
    def expert_ffn_size(self) -> int:
        """Inner size of one expert; of a model that has experts."""
        assert self.experts is not None
        return self.experts.ffn_size

    def has_experts(self, layer: int) -> bool:
        """Whether this layer of the whole model is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]


def load_hf_config(source: str | Path) -> HFModelConfig:
    """Read the configuration of an HF directory, or of the one kept inside a Megatron checkpoint.

    Raises:
        ModelError: no such model, an architecture or a feature that is not supported, or a field missing.
    """
    path = hf_directory(source)
    raw = _read_json(path / "config.json")
    family = _family(raw, path)
    _refuse_unsupported(raw, family, path)
    qkv_bias, qk_norm = FAMILIES[family]
    hidden_size = int(_field(raw, "hidden_size", path))
    num_heads = int(_field(raw, "num_attention_heads", path))
    num_kv_heads = int(raw.get("num_key_value_heads") or num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(f"{path}: {num_heads} attention heads are not a multiple of {num_kv_heads} kv heads")
    rope_theta, rope_scaling = _rope(raw, path)
    return HFModelConfig(
        family=family,
        vocab_size=int(_field(raw, "vocab_size", path)),
        hidden_size=hidden_size,
        num_layers=int(_field(raw, "num_hidden_layers", path)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=int(raw.get("head_dim") or hidden_size // num_heads),
        ffn_size=int(_field(raw, "intermediate_size", path)),
        rms_norm_eps=float(_field(raw, "rms_norm_eps", path)),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        experts=_experts(raw, path) if family == "qwen3_moe" else None,
        max_position_embeddings=int(_field(raw, "max_position_embeddings", path)),
        eos_token_ids=_eos_token_ids(raw, path),
        raw=raw,
        path=path,
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content


def _field(raw: dict[str, Any], name: str, path: Path) -> Any:
    if raw.get(name) is None:
        raise ModelError(f"{path / 'config.json'} has no '{name}'; is it the config of a language model?")
    return raw[name]


def _family(raw: dict[str, Any], path: Path) -> str:
    architectures = raw.get("architectures") or []
    named = _ARCHITECTURES.get(architectures[0]) if architectures else raw.get("model_type")
    if named is None or named not in FAMILIES:
        found = architectures[0] if architectures else raw.get("model_type")
        raise ModelError(f"{path}: architecture {found!r} is not supported; supported: {', '.join(_ARCHITECTURES)}")
    return named


def _experts(raw: dict[str, Any], path: Path) -> ExpertsConfig | None:
    # transformers 5 may write num_local_experts.
    num_experts = int(raw.get("num_experts") or raw.get("num_local_experts") or 0)
    if num_experts < 1:
        raise ModelError(f"{path / 'config.json'} has no 'num_experts'; is it the config of a mixture of experts?")
    experts_per_token = int(_field(raw, "num_experts_per_tok", path))
    normalize = bool(raw.get("norm_topk_prob", False))
    if not 1 <= experts_per_token <= num_experts:
        raise ModelError(f"{path}: num_experts_per_tok {experts_per_token} must be between 1 and {num_experts} experts")
    if experts_per_token == 1 and normalize:
        raise ModelError(
            f"{path}: norm_topk_prob with num_experts_per_tok 1 makes every weight 1, which megatron-core cannot do"
        )
    step = int(raw.get("decoder_sparse_step") or 1)
    dense = set(raw.get("mlp_only_layers") or ())
    layers = tuple(
        layer not in dense and (layer + 1) % step == 0 for layer in range(int(_field(raw, "num_hidden_layers", path)))
    )
    if not any(layers):
        return None
    return ExpertsConfig(
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        ffn_size=int(_field(raw, "moe_intermediate_size", path)),
        normalize=normalize,
        layers=layers,
    )


def _refuse_unsupported(raw: dict[str, Any], family: str, path: Path) -> None:
    windowed = raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ())
    if family == "mistral":
        # Mistral has no switch beside the size; a window as long as the positions changes nothing.
        positions = int(_field(raw, "max_position_embeddings", path))
        windowed = (raw.get("sliding_window") or positions) < positions
    refused = {
        f"hidden_act {raw.get('hidden_act')!r} (supported: 'silu')": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(raw.get("attention_bias")),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "sliding-window attention (where all sequences are shorter than the window, switch it off in config.json: "
        "sliding_window null, or max_position_embeddings no longer than it)": bool(windowed),
        "quantized weights (dequantize the model first)": bool(raw.get("quantization_config")),
        "partial_rotary_factor": raw.get("partial_rotary_factor", 1.0) != 1.0,
        "attention_dropout": bool(raw.get("attention_dropout")),
    }
    for feature, present in refused.items():
        if present:
            raise ModelError(f"{path / 'config.json'} asks for {feature}, which is not supported")


def _rope(raw: dict[str, Any], path: Path) -> tuple[float, dict[str, Any] | None]:
    # transformers 5 writes rope_parameters; older files have rope_theta beside rope_scaling.
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(parameters.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
    old_name = parameters.pop("type", None)
    rope_type = parameters.pop("rope_type", None) or old_name or "default"
    if rope_type not in _ROPE_KEYS:
        raise ModelError(
            f"{path / 'config.json'}: rope type {rope_type!r} is not supported; supported: {', '.join(_ROPE_KEYS)}"
        )
    missing = [key for key in _ROPE_KEYS[rope_type] if key not in parameters]
    if missing:
        raise ModelError(f"{path / 'config.json'}: rope type {rope_type!r} needs {', '.join(missing)}")
    if rope_type == "default":
        return theta, None
    return theta, {"rope_type": rope_type} | {key: parameters[key] for key in _ROPE_KEYS[rope_type]}


def _eos_token_ids(raw: dict[str, Any], path: Path) -> tuple[int, ...]:
    generation_file = path / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.exists() else {}
    value = generation.get("eos_token_id")
    if value is None:
        value = raw.get("eos_token_id")
    if value is None:
        return ()
    return tuple(int(token) for token in (value if isinstance(value, list) else [value]))
