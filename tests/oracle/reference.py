"""Brute force in float64 on transformers models: the whole [positions, vocabulary] matrix, written from the method's
definitions and sharing no code with the package."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

EPSILON = 1e-12  # what the released code takes for a probability that is missing from a model's own list


def load_float64(path: Path) -> torch.nn.Module:
    # grouped products of experts are not there in float64
    implementations = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, **implementations).eval()


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def response_logits(model: torch.nn.Module, rollout: dict, vocab_size: int) -> torch.Tensor:
    """Logits [response length, vocab_size] that predict the response tokens of one rollout."""
    prompt, response = rollout["prompt_tokens"], rollout["response_tokens"]
    logits = model(torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : len(prompt) + len(response) - 1, :vocab_size]


def _top_ids(logits: torch.Tensor, k: int) -> list[int]:
    return sorted(range(len(logits)), key=lambda i: (-logits[i].item(), i))[:k]


def token_row(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, token: int, k: int, support_mode: str
) -> dict[str, float]:
    """All statistics of one position from two full logit vectors (already divided by the temperature)."""
    log_s = torch.log_softmax(student_logits, -1)
    log_t = torch.log_softmax(teacher_logits, -1)
    p_s, p_t = log_s.exp(), log_t.exp()
    top_s, top_t = _top_ids(student_logits, k), _top_ids(teacher_logits, k)
    union = sorted(set(top_s) | set(top_t))
    both = set(top_s) & set(top_t)
    if support_mode == "exact":
        q_s, q_t = p_s[union], p_t[union]
    else:
        q_s = torch.tensor([p_s[i] if i in top_s else EPSILON for i in union], dtype=torch.float64)
        q_t = torch.tensor([p_t[i] if i in top_t else EPSILON for i in union], dtype=torch.float64)
    q_s, q_t = q_s / q_s.sum(), q_t / q_t.sum()
    on_s = p_s[top_s] / p_s[top_s].sum()
    c_exact = p_t[top_s].sum().item()
    c_bound = sum(p_t[i].item() for i in both)
    return {
        "D": (q_t * (q_t / q_s).log()).sum().item(),
        "C": c_exact if support_mode == "exact" else c_bound,
        "C_topk": c_bound,
        "H": -(p_s * log_s).sum().item(),
        "H_topk": -(on_s * on_s.log()).sum().item() / math.log(k),
        "kl_forward": (p_t * (log_t - log_s)).sum().item(),
        "kl_reverse": (p_s * (log_s - log_t)).sum().item(),
        "student_logprob": log_s[token].item(),
        "teacher_logprob": log_t[token].item(),
        "teacher_entropy": -(p_t * log_t).sum().item(),
        "overlap": len(both) / k,
        "student_mass": p_s[top_s].sum().item(),
        "teacher_mass": p_t[top_t].sum().item(),
    }


@torch.no_grad()
def statistics_table(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    rollouts: Sequence[dict],
    *,
    vocab_size: int,
    k: int = 16,
    temperature: float = 1.0,
    support_mode: str = "exact",
) -> list[dict]:
    """A row a response position, in file order."""
    rows = []
    for sample, rollout in enumerate(rollouts):
        logits_s = response_logits(student, rollout, vocab_size) / temperature
        logits_t = response_logits(teacher, rollout, vocab_size) / temperature
        for position, token in enumerate(rollout["response_tokens"]):
            row = token_row(logits_s[position], logits_t[position], token, k, support_mode)
            rows.append({"sample": sample, "position": position, "token_id": token, **row})
    return rows


def _normalise(values: list[float]) -> list[float]:
    ordered = sorted(values)

    def quantile(q: float) -> float:
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    low, high = quantile(0.05), quantile(0.95)
    if high - low < 1e-12:
        return [0.0] * len(values)
    return [min(max((v - low) / (high - low), 0.0), 1.0) for v in values]


def teachability_keep(rows: list[dict], keep_ratio: float, min_keep: int = 1) -> list[bool]:
    """Keep mask of the `teachability` selector: score D~C~, ties by raw D, then by sample and position."""
    d, c = _normalise([r["D"] for r in rows]), _normalise([r["C"] for r in rows])
    order = sorted(
        range(len(rows)),
        key=lambda i: (-d[i] * c[i], -rows[i]["D"], rows[i]["sample"], rows[i]["position"]),
    )
    keep = [False] * len(rows)
    for i in order[: math.ceil(keep_ratio * len(rows))]:
        keep[i] = True
    for sample in {r["sample"] for r in rows}:
        own = [i for i in order if rows[i]["sample"] == sample]
        for i in own[: max(0, min_keep)]:
            if sum(keep[j] for j in own) < min(min_keep, len(own)):
                keep[i] = True
    return keep


def loss_rows(
    name: str,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    tokens: torch.Tensor,
    *,
    k: int,
    support: str | None = None,
    beta: float | None = None,
    old_logprobs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss of each row [R] from full logits [R, V]; differentiable in the student's."""
    log_s, log_t = torch.log_softmax(student_logits, -1), torch.log_softmax(teacher_logits, -1)
    p_s, p_t = log_s.exp(), log_t.exp()
    if name == "reverse_kl":
        return (p_s * (log_s - log_t)).sum(-1)
    if name == "forward_kl":
        return (p_t * (log_t - log_s)).sum(-1)
    if name == "jsd":
        assert beta is not None
        mixed = (beta * p_t + (1 - beta) * p_s).log()
        return beta * (p_t * (log_t - mixed)).sum(-1) + (1 - beta) * (p_s * (log_s - mixed)).sum(-1)
    if name == "sampled_reverse_kl":
        new = log_s.gather(-1, tokens[:, None])[:, 0]
        old = new.detach() if old_logprobs is None else old_logprobs
        advantage = log_t.gather(-1, tokens[:, None])[:, 0].detach() - old
        return -advantage * (new - old).exp()
    losses = []
    for row in range(len(tokens)):
        ids_s = set(_top_ids(student_logits[row].detach(), k))
        ids_t = set(_top_ids(teacher_logits[row], k))
        ids = sorted({"student": ids_s, "teacher": ids_t, "union": ids_s | ids_t}[support or "student"])
        q_s = torch.cat([p_s[row, ids], 1 - p_s[row, ids].sum(0, keepdim=True)])
        q_t = torch.cat([p_t[row, ids], 1 - p_t[row, ids].sum(0, keepdim=True)])
        if name == "topk_reverse_kl":
            losses.append((q_s * (q_s / q_t).log()).sum())
        elif name == "topk_forward_kl":
            losses.append((q_t * (q_t / q_s).log()).sum())
        else:
            raise KeyError(name)
    return torch.stack(losses)
