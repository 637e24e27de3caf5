"""Weights that cannot be right, found while they are loaded: all zero or not finite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_taopd.convert.mapping import Sliceable, named
from megatron_taopd.convert.parameters import parameters_with_rules
from megatron_taopd.errors import ModelError
from megatron_taopd.models.hf_config import HFModelConfig

if TYPE_CHECKING:
    from megatron_taopd.models.gpt import DistillationGPTModel


@dataclass
class WeightReport:
    """What one rank saw of each tensor; a rank sees its slices only, so reports are merged before judging."""

    zero: set[str] = field(default_factory=set)
    """Tensors of which only zeros were seen."""
    nonzero: set[str] = field(default_factory=set)
    """Tensors of which something else was seen."""
    not_finite: set[str] = field(default_factory=set)
    """Tensors with infinities or NaN."""

    def see(self, name: str, value: torch.Tensor) -> None:
        """Note a tensor or a part of it. Biases may be zero; an empty part says nothing."""
        if value.numel() == 0:
            return
        low, high = torch.aminmax(value)  # one pass, a NaN makes both NaN; isfinite and any take fifty times as long
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            self.not_finite.add(name)
        if name.endswith("bias") or bool(low != 0) or bool(high != 0):
            self.nonzero.add(name)
        else:
            self.zero.add(name)

    def watch(self, name: str, source: Sliceable) -> Sliceable:
        """``source``, with every slice read from it noted."""
        return _Watched(name, source, self)

    def problems(self) -> list[str]:
        """One sentence a kind of problem, naming up to three tensors."""
        found = []
        for what, names in (
            ("all zero", self.zero - self.nonzero),
            ("not finite", self.not_finite),
        ):
            if names:
                listed = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
                found.append(f"{len(names)} tensor(s) are {what}: {listed}")
        return found


@dataclass(frozen=True)
class _Watched:
    name: str
    source: Sliceable
    report: WeightReport

    def __getitem__(self, index: slice | tuple[slice, ...]) -> torch.Tensor:
        value = self.source[index]
        self.report.see(self.name, value)
        return value


def inspect(module: DistillationGPTModel, hf: HFModelConfig) -> WeightReport:
    """A report on the parameters of a filled module, by their names in the whole model."""
    report = WeightReport()
    for _, parameter, layer, rule in parameters_with_rules(module, hf):
        report.see(named(rule.megatron, layer), parameter.detach())
    return report


def merged(reports: Iterable[WeightReport]) -> WeightReport:
    """What several parts of a model together looked like."""
    whole = WeightReport()
    for report in reports:
        whole.zero |= report.zero
        whole.nonzero |= report.nonzero
        whole.not_finite |= report.not_finite
    return whole


def refuse_unusable(where: str, report: WeightReport | None, error: ModelError | None = None) -> None:
    """Compare notes over all ranks and raise the same error everywhere if the weights are unusable.

    Collective: a rank whose loading failed calls it too, so that no other rank waits for it.

    Args:
        where: the model directory, for the message.
        report: what this rank saw; None if loading failed.
        error: why loading failed on this rank.

    Raises:
        ModelError: loading failed somewhere, or a tensor is all zero or not finite.
    """
    mine = (report, None if error is None else str(error))
    everyone: list[tuple[WeightReport | None, str | None]] = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [(None, None)] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
    failures = sorted({text for _, text in everyone if text is not None})
    if failures:
        raise ModelError(failures[0]) from error
    if problems := merged(seen for seen, _ in everyone if seen is not None).problems():
        raise ModelError(f"the weights of {where} are unusable: {'; '.join(problems)}; download them again")
