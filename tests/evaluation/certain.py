"""A model whose answers are known because its weights were made for them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_taopd.testing.tiny_models import save_tiny_hf_model
from tests.data.tokenizers_for_tests import SPECIAL, save_word_tokenizer

NUMBER = 9
VOCAB = 256  # no padding, hence no rows of zeros that a changed head could prefer


def save_certain_model(path: Path) -> Path:
    """It says a word's answer after the word: q3, a3, end; by its embedding and head alone."""
    words = [f"{kind}{i}" for i in range(NUMBER) for kind in "qa"]
    words += [f"w{i}" for i in range(VOCAB - len(SPECIAL) - len(words))]
    save_tiny_hf_model(path, "llama", vocab_size=VOCAB, num_layers=1)
    save_word_tokenizer(path, words)
    weights = load_file(path / "model.safetensors")
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] = weights[name] * 1e-5  # a layer adds nothing to speak of
        elif name.endswith("norm.weight"):
            weights[name] = torch.ones_like(weights[name])
    embedding = weights["model.embed_tokens.weight"]
    head = torch.zeros_like(embedding)
    for i in range(NUMBER):
        question, answer = (len(SPECIAL) + words.index(f"{kind}{i}") for kind in "qa")
        head[answer] = embedding[question]
        head[SPECIAL.index("<eos>")] += embedding[answer]
    weights["lm_head.weight"] = head
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path
