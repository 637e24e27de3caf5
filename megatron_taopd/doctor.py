"""What this machine has, and what the project will use of it. Nothing missing is an error here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform as python_platform
from dataclasses import dataclass, field

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from megatron_taopd import __version__
from megatron_taopd.fp8_config import DEFAULT_RECIPE
from megatron_taopd.fp8_support import RECIPES, Fp8Support
from megatron_taopd.ops.fp8 import FP8_CAPABILITY

PACKAGES = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "transformer-engine": "transformer_engine",
    "flash-attn": "flash_attn",
    "triton": "triton",
    "nemo-run": "nemo_run",
}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One CUDA device."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was found."""

    python: str
    versions: dict[str, str | None]
    """Package -> version; None where it is not installed."""
    apex: str | None
    """``nvidia``, ``unrelated`` (the PyPI project of that name) or None."""
    engine_range: str = ""
    """Versions of Transformer Engine that the installed megatron-core says it takes, such as ``<2.12,>=2.9``."""
    gpus: list[Gpu] = field(default_factory=list)
    cuda: str | None = None
    """Version that torch was built with."""
    backends: list[str] = field(default_factory=list)
    """``torch.distributed`` backends that this torch was built with."""
    cpu_cores: int = 1
    cpu_threads: int = 1
    """Threads that torch uses for one operation."""

    @property
    def has_transformer_engine(self) -> bool:
        """Installed, and a CUDA device is there to run it."""
        return self.versions.get("transformer-engine") is not None and bool(self.gpus)


def inspect_machine() -> Machine:
    """Look around without importing Megatron or Transformer Engine."""
    import torch
    import torch.distributed as dist

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            gpus.append(Gpu(name=found.name, capability=(found.major, found.minor), memory_bytes=found.total_memory))
    backends = []
    if dist.is_available():
        known = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
        backends = [name for name, available in known.items() if available()]
    return Machine(
        python=python_platform.python_version(),
        versions={name: _version(name, module) for name, module in PACKAGES.items()},
        apex=_which_apex(),
        engine_range=_engine_range(),
        gpus=gpus,
        cuda=torch.version.cuda,
        backends=backends,
        cpu_cores=_usable_cores(),
        cpu_threads=torch.get_num_threads(),
    )


def _version(package: str, module: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version" if _importable(module) else None


def _engine_range() -> str:
    """From the extras of megatron-core's metadata; empty where they say nothing."""
    try:
        needed = map(Requirement, importlib.metadata.requires("megatron-core") or [])
    except importlib.metadata.PackageNotFoundError:
        return ""
    ranges = [requirement.specifier for requirement in needed if requirement.name == "transformer-engine"]
    return str(ranges[0]) if ranges else ""


def _engine_fits(machine: Machine) -> bool:
    try:
        engine = Version(machine.versions.get("transformer-engine") or "")
    except InvalidVersion:  # not installed, or nothing is known of it
        return True
    return SpecifierSet(machine.engine_range).contains(engine.base_version)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _which_apex() -> str | None:
    """NVIDIA's Apex has ``apex.optimizers``; the web toolkit of the same name on PyPI has not."""
    if not _importable("apex"):
        return None
    return "nvidia" if _importable("apex.optimizers") else "unrelated"


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def what_is_used(machine: Machine) -> list[str]:
    """In plain words, what a run here will use and what it cannot."""
    lines = []
    if machine.gpus:
        lines.append(f"ranks: one a GPU, up to {len(machine.gpus)} on this machine, talking over nccl")
    else:
        lines.append(
            f"ranks: CPU processes talking over gloo ({machine.cpu_cores} cores); megatron-core runs through the CPU "
            "adaptor, for development and small models"
        )
    if machine.has_transformer_engine:
        lines.append("layers: Transformer Engine")
        flash = machine.versions.get("flash-attn")
        lines.append(
            f"attention: Transformer Engine{'' if flash is None else f', flash-attn {flash} among its kernels'}"
        )
        lines.append("optimizer: fused Adam of Transformer Engine")
    else:
        lines.append("layers: megatron-core's local layers with our RMSNorm (sequence parallelism works)")
        lines.append("attention: torch scaled_dot_product_attention")
        fused = machine.apex == "nvidia" and bool(machine.gpus)
        lines.append(f"optimizer: {'fused Adam of Apex' if fused else 'torch AdamW'}")
    lines.append("gradient accumulation fusion, all that Apex adds to Transformer Engine: off")
    lines.append(f"statistics: torch; --statistics-kernel triton is {statistics_kernel_verdict(machine)}")
    lines.append(f"fp8 layers: {fp8_verdict(machine)}")
    lines.append(f"fp8 head of scoring: {fp8_head_verdict(machine)}")
    if machine.gpus:
        oldest = min(gpu.capability for gpu in machine.gpus)
        lines.append(f"bf16: {'yes' if oldest >= (8, 0) else 'slow, no bf16 tensor cores before Ampere'}")
    else:
        lines.append("bf16: yes, but on a CPU it saves memory, hardly time")
    return lines


def fp8_verdict(machine: Machine) -> str:
    """With which --fp8-recipe layers can be FP8, and why not with the others."""
    support = Fp8Support(
        transformer_engine=machine.versions.get("transformer-engine"),
        gpus=tuple((gpu.name, gpu.capability) for gpu in machine.gpus),
        cuda=machine.cuda,
    )
    obstacles = {recipe: support.obstacle(recipe) for recipe in RECIPES}
    possible = [recipe for recipe, obstacle in obstacles.items() if obstacle is None]
    if not possible:
        return f"not possible, {obstacles[DEFAULT_RECIPE]}"
    engine = machine.versions["transformer-engine"]
    refused = "; ".join(f"not {recipe}: {why}" for recipe, why in obstacles.items() if why is not None)
    return f"possible with {', '.join(possible)} (Transformer Engine {engine})" + (f"; {refused}" if refused else "")


def fp8_head_verdict(machine: Machine) -> str:
    """Whether --score-head-precision fp8 can be used, which needs no Transformer Engine."""
    if not machine.gpus:
        return "possible, emulated: on a CPU slower than the model's own"
    unable = [gpu for gpu in machine.gpus if gpu.capability < FP8_CAPABILITY]
    if unable:
        needed, found = (".".join(map(str, capability)) for capability in (FP8_CAPABILITY, unable[0].capability))
        return f"not possible, {unable[0].name} has compute capability {found} and {needed} is needed"
    return "possible"


def statistics_kernel_verdict(machine: Machine) -> str:
    """Whether --statistics-kernel triton can be used."""
    if not machine.gpus:
        return "not possible, no CUDA device"
    if machine.versions.get("triton") is None:
        return "not possible, triton is missing: pip install triton"
    return "possible; tools/check_kernels.py compares it with torch on this GPU"


def warnings(machine: Machine) -> list[str]:
    """What will go wrong, or slowly, and what to do."""
    lines = []
    if machine.versions.get("megatron-core") is None:
        lines.append("megatron-core is not installed: pip install megatron-core")
    if not _engine_fits(machine):
        lines.append(
            f"megatron-core {machine.versions.get('megatron-core')} is made for Transformer Engine "
            f"{machine.engine_range} and {machine.versions['transformer-engine']} is installed: "
            f'pip install --no-build-isolation "transformer-engine[pytorch]{machine.engine_range}"'
        )
    if machine.apex == "unrelated":
        lines.append(
            "the installed package 'apex' is an unrelated PyPI project that megatron-core takes for NVIDIA's: "
            "pip uninstall apex"
        )
    if machine.versions.get("transformer-engine") is not None and not machine.gpus:
        lines.append("Transformer Engine is installed but there is no CUDA device: it is not used")
    if machine.gpus and "nccl" not in machine.backends:
        lines.append("this torch has no nccl: several GPUs cannot work together")
    if not machine.gpus and machine.cpu_threads > 1:
        lines.append("several ranks on one CPU are fastest with OMP_NUM_THREADS=1")
    return lines


def report(machine: Machine | None = None) -> str:
    """The text of ``taopd doctor``."""
    machine = machine or inspect_machine()
    found = [f"megatron_taopd {__version__}, Python {machine.python}", "", "Found"]
    found += [f"  {name:<20} {version or '-'}" for name, version in machine.versions.items()]
    apex = {"nvidia": "NVIDIA's", "unrelated": "an unrelated package of that name", None: "-"}[machine.apex]
    found.append(f"  {'apex':<20} {apex}")
    if not machine.gpus:
        found.append(f"  {'GPUs':<20} -")
    for index, gpu in enumerate(machine.gpus):
        major, minor = gpu.capability
        size = gpu.memory_bytes / 2**30
        found.append(f"  {f'GPU {index}':<20} {gpu.name}, compute capability {major}.{minor}, {size:.0f} GiB")
    found.append(f"  {'CPU':<20} {machine.cpu_cores} cores, torch uses {machine.cpu_threads} threads")
    found.append(f"  {'backends':<20} {', '.join(machine.backends) or '-'}")
    used = ["", "What will be used", *(f"  {line}" for line in what_is_used(machine))]
    told = [f"  {line}" for line in warnings(machine)]
    return "\n".join([*found, *used, *(["", "Worth knowing", *told] if told else [])])
