"""Whether Transformer Engine and the GPUs of this machine can run FP8 layers, and if not, why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

from megatron_taopd.ops.fp8 import FP8_CAPABILITY

# Recipe -> oldest Transformer Engine that megatron-core uses it with, oldest compute capability, first one that lacks
# it, oldest CUDA.
_NEEDS: dict[str, tuple[tuple[int, int], tuple[int, int], tuple[int, int] | None, tuple[int, int] | None]] = {
    "delayed": ((1, 7), FP8_CAPABILITY, None, None),
    "tensorwise": ((2, 2), FP8_CAPABILITY, None, None),
    "blockwise": ((2, 3), (9, 0), None, (12, 9)),
    "mxfp8": ((2, 1), (10, 0), (12, 0), None),
}
RECIPES = tuple(_NEEDS)


@dataclass(frozen=True, kw_only=True)
class Fp8Support:
    """What FP8 layers need, as found on a machine."""

    transformer_engine: str | None
    """Version; None where it is not installed."""
    gpus: tuple[tuple[str, tuple[int, int]], ...] = ()
    """Name and compute capability of each CUDA device."""
    cuda: str | None = None
    """Version that torch was built with."""

    def obstacle(self, recipe: str) -> str | None:
        """Why layers cannot use this recipe here; None: they can."""
        if not self.gpus:
            return "there is no CUDA device"
        engine, oldest, ended, cuda = _NEEDS[recipe]
        for name, capability in self.gpus:
            if capability < oldest:
                return f"{name} has compute capability {_dotted(capability)} and {_dotted(oldest)} is needed"
            if ended is not None and capability >= ended:
                return f"{name} has compute capability {_dotted(capability)}, for which Transformer Engine lacks it"
        if self.transformer_engine is None:
            return "Transformer Engine is missing; install the 'te' extra"
        if _parsed(self.transformer_engine) < engine:
            return f"Transformer Engine {self.transformer_engine} is older than {_dotted(engine)}"
        if cuda is not None and _parsed(self.cuda or "0") < cuda:
            return f"torch was built with CUDA {self.cuda} and {_dotted(cuda)} is needed"
        return None


def find_fp8_support() -> Fp8Support:
    """Of this machine, without importing Transformer Engine."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            gpus.append((found.name, (found.major, found.minor)))
    return Fp8Support(transformer_engine=_engine_version(), gpus=tuple(gpus), cuda=torch.version.cuda)


def _engine_version() -> str | None:
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        return importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        import transformer_engine

        return str(getattr(transformer_engine, "__version__", "0"))


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _parsed(version: str) -> tuple[int, int]:
    numbers = [int("".join(c for c in part if c.isdigit()) or 0) for part in version.split("+")[0].split(".")[:2]]
    return (numbers[0], numbers[1] if len(numbers) > 1 else 0)
