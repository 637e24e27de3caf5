"""Brute force in float64 on one process, from the method's definitions: what the fast code must equal.

It takes whole logit matrices [R, vocabulary], loops over rows where that is plainer, and shares no code with
the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch


@dataclass
class Problem:
    """Random hidden states and LM heads of two models of different width; float64 unless cast."""

    student_hidden: torch.Tensor
    teacher_hidden: torch.Tensor
    student_weight: torch.Tensor
    teacher_weight: torch.Tensor
    tokens: torch.Tensor
    old_logprobs: torch.Tensor
    vocab: int
    """Real ids; rows of the weights from there on are padding (full of large numbers, to be noticed)."""

    def logits(self, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        student = self.student_hidden.double() @ self.student_weight[: self.vocab].double().t()
        teacher = self.teacher_hidden.double() @ self.teacher_weight[: self.vocab].double().t()
        return student / temperature, teacher / temperature

    def to(self, dtype: torch.dtype) -> Problem:
        return Problem(
            self.student_hidden.to(dtype),
            self.teacher_hidden.to(dtype),
            self.student_weight.to(dtype),
            self.teacher_weight.to(dtype),
            self.tokens,
            self.old_logprobs.to(dtype),
            self.vocab,
        )

    def on(self, device: str) -> Problem:
        """The same on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Problem(**{n: v.to(device) if torch.is_tensor(v) else v for n, v in values.items()})


def make_problem(
    num_rows: int, vocab: int, *, padded: int, width: int = 12, seed: int = 0, ties: bool = False
) -> Problem:
    """With ``ties`` all numbers are small integers: many logits are exactly equal in any order of summing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        if ties:
            return torch.randint(-1, 2, shape, generator=generator).double()
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def head(width: int) -> torch.Tensor:
        weight = normal(padded, width)
        weight[vocab:] = 50.0
        return weight

    shared = normal(num_rows, width)
    return Problem(
        student_hidden=shared,
        teacher_hidden=torch.cat([shared, normal(num_rows, 4)], dim=-1),
        student_weight=head(width),
        teacher_weight=head(width + 4),
        tokens=torch.randint(0, vocab, (num_rows,), generator=generator),
        old_logprobs=-3 - normal(num_rows).abs(),
        vocab=vocab,
    )


def top_ids(logits: torch.Tensor, k: int) -> list[int]:
    return sorted(range(len(logits)), key=lambda i: (-logits[i].item(), i))[:k]


def statistics_row(s: torch.Tensor, t: torch.Tensor, token: int, k: int, mode: str) -> dict[str, float]:
    """Statistics of one position from two whole logit vectors."""
    p_s, p_t = (x.softmax(-1).tolist() for x in (s, t))
    log_s, log_t = (x.log_softmax(-1).tolist() for x in (s, t))
    in_s, in_t = top_ids(s, k), top_ids(t, k)
    both = set(in_s) & set(in_t)
    union = sorted(set(in_s) | set(in_t))
    if mode == "upstream":
        q_s = {v: p_s[v] if v in in_s else 1e-12 for v in union}
        q_t = {v: p_t[v] if v in in_t else 1e-12 for v in union}
    else:
        q_s, q_t = {v: p_s[v] for v in union}, {v: p_t[v] for v in union}
    z_s, z_t = math.fsum(q_s.values()), math.fsum(q_t.values())
    divergence = math.fsum(q_t[v] / z_t * (math.log(q_t[v] / z_t) - math.log(q_s[v] / z_s)) for v in union)
    mass_s = math.fsum(p_s[v] for v in in_s)
    shares = [p_s[v] / mass_s for v in in_s]
    c_bound = math.fsum(p_t[v] for v in both)
    everything = range(len(p_s))
    return {
        "D": divergence,
        "C": math.fsum(p_t[v] for v in in_s) if mode == "exact" else c_bound,
        "C_topk": c_bound,
        "H": -math.fsum(p_s[v] * log_s[v] for v in everything),
        "H_topk": -math.fsum(q * math.log(q) for q in shares) / math.log(k) if k > 1 else 0.0,
        "kl_forward": math.fsum(p_t[v] * (log_t[v] - log_s[v]) for v in everything),
        "kl_reverse": math.fsum(p_s[v] * (log_s[v] - log_t[v]) for v in everything),
        "student_logprob": log_s[token],
        "teacher_logprob": log_t[token],
        "teacher_entropy": -math.fsum(p_t[v] * log_t[v] for v in everything),
        "overlap": len(both) / k,
        "student_mass": mass_s,
        "teacher_mass": math.fsum(p_t[v] for v in in_t),
        "teacher_top1_in_student": in_t[0] in in_s,
        "rank_in_student": in_s.index(token) if token in in_s else k,
        "rank_in_teacher": in_t.index(token) if token in in_t else k,
    }


def loss_rows(
    name: str,
    s: torch.Tensor,
    t: torch.Tensor,
    tokens: torch.Tensor,
    old: torch.Tensor,
    *,
    k: int,
    support: str | None,
    beta: float | None,
    clip: float | None,
) -> torch.Tensor:
    """Loss of each row [R] from whole logits; differentiable in the student's by plain autograd."""
    p_s, p_t = s.softmax(-1), t.softmax(-1)
    if name == "reverse_kl":
        return (p_s * (p_s.log() - p_t.log())).sum(-1)
    if name == "forward_kl":
        return (p_t * (p_t.log() - p_s.log())).sum(-1)
    if name == "jsd":
        assert beta is not None
        m = beta * p_t + (1 - beta) * p_s
        return beta * (p_t * (p_t / m).log()).sum(-1) + (1 - beta) * (p_s * (p_s / m).log()).sum(-1)
    if name == "sampled_reverse_kl":
        row = torch.arange(len(tokens))
        advantage = (p_t[row, tokens].log() - old).detach()
        ratio = p_s[row, tokens] / old.exp()
        plain = -advantage * ratio
        if clip is None:
            return plain
        return torch.maximum(plain, -advantage * ratio.clamp(1 - clip, 1 + clip))
    rows = []
    for i in range(len(tokens)):
        in_s, in_t = top_ids(s[i].detach(), k), top_ids(t[i], k)
        ids = {"student": in_s, "teacher": in_t, "union": sorted(set(in_s) | set(in_t))}[support or "student"]
        rest = [v for v in range(s.shape[1]) if v not in ids]
        q_s, q_t = p_s[i, ids], p_t[i, ids]
        if rest:
            q_s = torch.cat([q_s, p_s[i, rest].sum()[None]])
            q_t = torch.cat([q_t, p_t[i, rest].sum()[None]])
        a, b = (q_s, q_t) if name == "topk_reverse_kl" else (q_t, q_s)
        rows.append((a * (a / b).log()).sum())
    return torch.stack(rows) if rows else s.sum() * torch.zeros(0, dtype=s.dtype)
