"""The passes over a tile of logits that both models' softmax quantities need, plain or as one compiled loop.

Shapes: R rows, W ids of a tile, P disjoint parts of the vocabulary. With e = exp(z - max) of student and teacher the
eight sums of a row are: max_s, max_t, sum e_s, sum e_t, sum e_s (z_s - max_s), sum e_t (z_t - max_t),
sum e_s (z_s - z_t), sum e_t (z_s - z_t).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from megatron_taopd.errors import ConfigError

NUM_SUMS = 8

SoftmaxSums = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Student and teacher logits [R, W] and their maxima [R] to the sums, float64 [8, R]."""


class PlainSoftmaxSums:
    """One torch operation a pass, through three buffers that are made once."""

    def __init__(self, buffers: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        self.buffers = buffers

    def __call__(
        self, student_RW: torch.Tensor, teacher_RW: torch.Tensor, max_s_R: torch.Tensor, max_t_R: torch.Tensor
    ) -> torch.Tensor:
        gap_RW, shifted_RW, mass_RW = (b[: student_RW.numel()].view(student_RW.shape) for b in self.buffers)
        torch.sub(student_RW, teacher_RW, out=gap_RW)
        mass, dot, gap = [], [], []
        for logits_RW, max_R in ((student_RW, max_s_R), (teacher_RW, max_t_R)):
            torch.sub(logits_RW, max_R[:, None], out=shifted_RW)
            torch.exp(shifted_RW, out=mass_RW)
            mass.append(mass_RW.sum(-1))
            dot.append(shifted_RW.mul_(mass_RW).sum(-1))
            gap.append(mass_RW.mul_(gap_RW).sum(-1))
        return torch.stack([max_s_R, max_t_R, *mass, *dot, *gap]).double()


class CompiledSoftmaxSums:
    """The same in one loop through torch.compile; needs a C++ compiler on CPU, Triton on GPUs."""

    def __call__(
        self, student_RW: torch.Tensor, teacher_RW: torch.Tensor, max_s_R: torch.Tensor, max_t_R: torch.Tensor
    ) -> torch.Tensor:
        try:
            mass_s, mass_t, dot_s, dot_t, gap_s, gap_t = _compiled()(student_RW, teacher_RW, max_s_R, max_t_R)
        except torch._dynamo.exc.BackendCompilerFailed as failure:
            raise ConfigError(
                "--compile-statistics: torch.compile found no working compiler (a C++ compiler for CPU, Triton for "
                f"GPUs); install one or drop the flag. It said: {str(failure).splitlines()[0]}"
            ) from failure
        sums = torch.stack([max_s_R, max_t_R, mass_s, mass_t, dot_s, dot_t, gap_s, gap_t]).double()
        sums[6:] += sums[2:4] * (max_s_R - max_t_R).double()
        return sums


@functools.cache
def _compiled() -> Callable[..., list[torch.Tensor]]:
    return torch.compile(_sums, dynamic=True, fullgraph=True)


def _sums(
    student_RW: torch.Tensor, teacher_RW: torch.Tensor, max_s_R: torch.Tensor, max_t_R: torch.Tensor
) -> list[torch.Tensor]:
    # The loop adds up in fp32 term by term, so the gap is taken against that of the maxima, which keeps it small.
    gap = (student_RW - teacher_RW) - (max_s_R - max_t_R)[:, None]
    shifted_s, shifted_t = student_RW - max_s_R[:, None], teacher_RW - max_t_R[:, None]
    mass_s, mass_t = shifted_s.exp(), shifted_t.exp()
    products = (mass_s, mass_t, mass_s * shifted_s, mass_t * shifted_t, mass_s * gap, mass_t * gap)
    return [product.sum(-1) for product in products]


def combine_sums(parts_P8R: torch.Tensor) -> torch.Tensor:
    """The sums over all ids [8, R] from those of disjoint parts [P, 8, R]."""
    parts_P8R = parts_P8R.double()
    maximum_P2R, mass_P2R, dot_P2R, gap_P2R = parts_P8R.split(2, dim=1)
    maximum_2R = maximum_P2R.amax(0)
    lower_P2R = maximum_P2R - maximum_2R
    scale_P2R = lower_P2R.exp()
    mass = scale_P2R * mass_P2R
    dot = scale_P2R * (dot_P2R + lower_P2R * mass_P2R)
    return torch.cat([maximum_2R, mass.sum(0), dot.sum(0), (scale_P2R * gap_P2R).sum(0)])
