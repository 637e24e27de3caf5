"""Random heads and hidden states of a student and a teacher that mostly agree, as after some training.

Shapes: T positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

LOGIT_STD = 3.0


@dataclass(frozen=True)
class Shape:
    """What a contender works on."""

    tokens: int
    student_hidden: int
    teacher_hidden: int
    vocab: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``T,H_student,H_teacher,V``."""
        return cls(*(int(part) for part in text.split(",")))

    def __str__(self) -> str:
        return f"T {self.tokens:,}, H {self.student_hidden:,}/{self.teacher_hidden:,}, V {self.vocab:,}"


@dataclass
class Problem:
    """Inputs in fp32; those of the student ask for their gradient."""

    student_hidden_TH: torch.Tensor
    teacher_hidden_TH: torch.Tensor
    student_weight_VH: torch.Tensor
    teacher_weight_VH: torch.Tensor
    token_ids_T: torch.Tensor

    def first_rows(self, count: int) -> Problem:
        """The same heads, and a copy of some hidden states."""
        hidden_TH = self.student_hidden_TH.detach()[:count].clone().requires_grad_(self.student_hidden_TH.requires_grad)
        rows = {"teacher_hidden_TH": self.teacher_hidden_TH[:count], "token_ids_T": self.token_ids_T[:count]}
        return replace(self, student_hidden_TH=hidden_TH, **rows)

    def take_grads(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of hidden states and head, which are cleared."""
        grads = self.student_hidden_TH.grad, self.student_weight_VH.grad
        self.student_hidden_TH.grad = self.student_weight_VH.grad = None
        return grads


def make_problem(shape: Shape, *, seed: int = 0, requires_grad: bool = True) -> Problem:
    """The teacher's logits are the student's, a little sharper, plus noise of its own dimensions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    own = shape.teacher_hidden - shape.student_hidden
    hidden_TH = normal(shape.tokens, shape.student_hidden)
    weight_VH = normal(shape.vocab, shape.student_hidden) * (LOGIT_STD / math.sqrt(shape.student_hidden))
    teacher_hidden_TH = torch.cat([1.1 * hidden_TH, normal(shape.tokens, own)], dim=-1)
    teacher_weight_VH = torch.cat([weight_VH, normal(shape.vocab, own) / math.sqrt(max(own, 1))], dim=-1)
    return Problem(
        student_hidden_TH=hidden_TH.requires_grad_(requires_grad),
        teacher_hidden_TH=teacher_hidden_TH,
        student_weight_VH=weight_VH.requires_grad_(requires_grad),
        teacher_weight_VH=teacher_weight_VH,
        token_ids_T=torch.randint(0, shape.vocab, (shape.tokens,), generator=generator),
    )
