"""Small random HF models: real transformers configurations and weights, made in milliseconds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch

Family = Literal["qwen3", "qwen3_moe", "qwen2", "llama", "mistral"]


def save_tiny_hf_model(
    path: str | Path,
    family: Family,
    *,
    vocab_size: int = 509,
    hidden_size: int = 64,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    ffn_size: int = 96,
    head_dim: int | None = None,
    tied: bool = False,
    rope_scaling: dict[str, Any] | None = None,
    num_experts: int = 8,
    experts_per_token: int = 2,
    expert_ffn_size: int = 32,
    normalize_experts: bool = True,
    dense_layers: tuple[int, ...] = (),
    seed: int = 0,
) -> Path:
    """Write an HF directory of a random model: config, generation config, fp32 safetensors, no tokenizer.

    Weights are drawn so that everything that can go wrong shows: next-token distributions are far from
    uniform and differ between seeds, norm weights are not 1 and biases not 0. Stop token 2, padding token 0.

    Args:
        path: directory to create.
        family: architecture; ``qwen3`` has norms on queries and keys, ``qwen2`` biases on q, k and v.
        head_dim: size of a head; default ``hidden_size // num_heads``.
        tied: the embedding is the LM head as well.
        rope_scaling: ``rope_type`` and its parameters as in config.json.
        num_experts: and the four that follow: of ``qwen3_moe`` alone.
        dense_layers: layers with one ffn of ``ffn_size`` instead of experts.
        seed: of the weights.

    Returns:
        ``path``.
    """
    special: dict[str, Any] = {}
    if family == "qwen3_moe":
        special.update(
            num_experts=num_experts,
            num_experts_per_tok=experts_per_token,
            moe_intermediate_size=expert_ffn_size,
            norm_topk_prob=normalize_experts,
            mlp_only_layers=list(dense_layers),
        )
    if family == "mistral":
        special.update(sliding_window=None)
    if rope_scaling is not None:
        special.update(rope_parameters={"rope_theta": 10000.0} | rope_scaling)
    model = _model_class(family)(
        _config(
            family,
            **special,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            intermediate_size=ffn_size,
            head_dim=head_dim or hidden_size // num_heads,
            tie_word_embeddings=tied,
            max_position_embeddings=512,
            rms_norm_eps=1e-6,
            eos_token_id=2,
            bos_token_id=1,
            # Only in the generation config: here it would take its row of the embedding out of the gradient.
            pad_token_id=None,
        )
    ).float()
    randomise(model, seed)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(path)
    return Path(path)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter of a transformers model anew, from ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            if name.endswith("norm.weight"):
                weight.copy_(1.0 + 0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(noise * (_gain(name) / math.sqrt(weight.shape[-1])))


def _gain(name: str) -> float:
    # The head spreads logits over about +-2; a tied embedding must stay below what the layers add to it.
    if "embed_tokens" in name or "lm_head" in name:
        return 2.0
    return 3.0 if name.removesuffix(".weight").endswith(("o_proj", "down_proj")) else 1.5


def _config(family: Family, **settings: Any) -> Any:
    import transformers

    if family == "qwen2":
        if settings.pop("head_dim") * settings["num_attention_heads"] != settings["hidden_size"]:
            raise ValueError("Qwen2 has heads of size hidden_size // num_heads")
        return transformers.Qwen2Config(**settings)
    classes = {
        "qwen3": transformers.Qwen3Config,
        "qwen3_moe": transformers.Qwen3MoeConfig,
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
    }
    return classes[family](**settings)


def _model_class(family: Family) -> Any:
    import transformers

    return {
        "qwen3": transformers.Qwen3ForCausalLM,
        "qwen3_moe": transformers.Qwen3MoeForCausalLM,
        "qwen2": transformers.Qwen2ForCausalLM,
        "llama": transformers.LlamaForCausalLM,
        "mistral": transformers.MistralForCausalLM,
    }[family]
