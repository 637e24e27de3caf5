"""Plain fine-tuning of a small Qwen3-shaped model on written-out workings."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from task import EOS, PAD, Problem, vocabulary, working

IDS = {word: i for i, word in enumerate(vocabulary())}


def make_model(*, hidden_size: int, num_layers: int, num_heads: int, seed: int) -> Any:
    """A Qwen3 model with random weights."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=len(IDS),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=hidden_size // num_heads,
        intermediate_size=3 * hidden_size,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=IDS[EOS],
        bos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.Qwen3ForCausalLM(config).float()
    model.generation_config.eos_token_id = IDS[EOS]
    model.generation_config.pad_token_id = IDS[PAD]
    return model


def batches(
    source: Iterator[Problem], size: int, *, silent: frozenset[str], jump: float, chooser: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (tokens [B, L], loss mask [B, L - 1]); kinds of words in ``silent`` carry no loss.

    All problems of a source have as many terms, so that no padding is needed.
    """
    while True:
        rows, masks = [], []
        for _ in range(size):
            problem = next(source)
            words, kinds = working(problem, jump=jump, chooser=chooser)
            prompt = problem.prompt.split()
            rows.append([IDS[word] for word in prompt + words])
            masks.append([0.0] * (len(prompt) - 1) + [float(kind not in silent) for kind in kinds])
        yield torch.tensor(rows), torch.tensor(masks)


def fine_tune(
    model: Any,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    *,
    steps: int,
    lr: float,
    warmup: int = 0,
    decay: bool = False,
    until: Callable[[], bool] | None = None,
) -> int:
    """Adam with an optional linear warm-up and a linear decay to 0, gradient clipped to 1.

    Args:
        steps: at most.
        until: asked after every tenth step whether it is enough.

    Returns:
        The steps that were made.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        tokens, mask = next(data)
        factor = min(1.0, (step + 1) / max(warmup, 1)) * ((1 - step / steps) if decay else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        logits = model(tokens[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        loss = (losses * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if until is not None and step % 10 == 9 and until():
            return step + 1
    return steps


@torch.no_grad()
def accuracy_by_kind(model: Any, source: Iterator[Problem], count: int) -> dict[str, float]:
    """Share of the words of each kind that the model finds likeliest behind the right ones before them."""
    rows, kinds = [], []
    for problem in islice(source, count):
        prompt = problem.prompt.split()
        words, kinds_of_words = working(problem)
        rows.append([IDS[word] for word in prompt + words])
        kinds.append(["prompt"] * (len(prompt) - 1) + kinds_of_words)
    ids = torch.tensor(rows)
    good = (model(ids[:, :-1]).logits.argmax(-1) == ids[:, 1:]).tolist()
    right: dict[str, list[bool]] = {}
    for good_row, kinds_row in zip(good, kinds, strict=True):
        for is_good, kind in zip(good_row, kinds_row, strict=True):
            right.setdefault(kind, []).append(is_good)
    return {kind: sum(values) / len(values) for kind, values in right.items() if kind != "prompt"}
