"""One plan, and a search for layouts that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_taopd.errors import ConfigError
from megatron_taopd.models import HFModelConfig, check_layout, refuse_expert_layout_in_vain
from megatron_taopd.plan.config import PlanConfig
from megatron_taopd.plan.gpus import GIB
from megatron_taopd.plan.memory import Memory, stage_memory
from megatron_taopd.plan.timing import PhaseTime, phase_times
from megatron_taopd.plan.traffic import Traffic, step_traffic
from megatron_taopd.platform.layout import ParallelConfig
from megatron_taopd.run_config import BatchConfig, RecomputeConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a layout takes."""

    config: PlanConfig
    student: HFModelConfig
    teacher: HFModelConfig
    stages: list[Memory]
    """Memory of the ranks of each stage."""
    traffic: list[Traffic]
    times: dict[str, PhaseTime]

    @property
    def peak(self) -> int:
        """Bytes of the fullest rank."""
        return max(memory.peak for memory in self.stages)

    @property
    def room(self) -> float:
        """Bytes of a GPU that a rank may take."""
        return (self.config.hardware.memory_gib - self.config.reserve_gib) * GIB

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return self.peak <= self.room

    @property
    def seconds(self) -> float:
        """Least time of a step."""
        return sum(time.bound for time in self.times.values())

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return {
            "config": asdict(self.config),
            "fits": self.fits,
            "peak_bytes": self.peak,
            "room_bytes": round(self.room),
            "stages": [memory.as_dict() for memory in self.stages],
            "traffic": [asdict(traffic) for traffic in self.traffic],
            "times": {phase: asdict(time) | {"bound": time.bound} for phase, time in self.times.items()},
            "seconds": self.seconds,
        }


def make_plan(config: PlanConfig, student: HFModelConfig, teacher: HFModelConfig) -> Plan:
    """The plan of the layout that the flags give.

    Raises:
        ConfigError: the layout divides the GPUs, the batch or a model not, or a setting has no effect.
    """
    parallel = config.parallel
    own = config.teacher_parallel.resolve(parallel)
    parallel.check_world_size(config.num_gpus)
    replicas = config.num_gpus // parallel.model_parallel_size
    BatchConfig(micro_batch_size=config.micro_batch_size, global_batch_size=config.global_batch_size).per_replica(
        parallel, replicas
    )
    check_layout(student, parallel)
    refuse_expert_layout_in_vain(parallel, student, teacher)
    check_layout(teacher, own or parallel)
    if own is not None:
        own.check_world_size(config.num_gpus)
    if student.experts is not None and parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        raise ConfigError(f"{student.path} has experts, which train with --sequence-parallel at TP > 1; set that flag")
    traffic = step_traffic(config, student, teacher)
    return Plan(
        config=config,
        student=student,
        teacher=teacher,
        stages=[
            stage_memory(config, student, teacher, stage=stage)
            for stage in range(parallel.pipeline_model_parallel_size)
        ],
        traffic=traffic,
        times=phase_times(config, student, teacher, traffic),
    )


def propose(config: PlanConfig, student: HFModelConfig, teacher: HFModelConfig) -> list[Plan]:
    """Plans of all layouts tried, those that fit first, each group in order: least time, or least memory."""
    plans = []
    for candidate in _candidates(config, mixtures=student.experts is not None or teacher.experts is not None):
        try:
            plans.append(make_plan(candidate, student, teacher))
        except ConfigError:
            continue  # does not divide
    return sorted(plans, key=lambda plan: (not plan.fits, plan.seconds if plan.fits else plan.peak, plan.peak))


def _candidates(config: PlanConfig, *, mixtures: bool) -> Iterator[PlanConfig]:
    recomputes = (
        RecomputeConfig(),
        RecomputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    )
    sizes = [2**power for power in range(8)]
    for tensor in [size for size in sizes if size <= min(8, config.gpus_per_node)]:
        for stages in [size for size in sizes if size <= 16]:
            for context in (1, 2, 4):
                for experts in sizes if mixtures else (1,):
                    layout = ParallelConfig(
                        tensor_model_parallel_size=tensor,
                        sequence_parallel=tensor > 1,
                        pipeline_model_parallel_size=stages,
                        context_parallel_size=context,
                        expert_model_parallel_size=experts,
                        expert_tensor_parallel_size=1 if experts > 1 else None,
                    )
                    for recompute in recomputes:
                        yield replace(config, propose=False, parallel=layout, recompute=recompute)


def advice(plan: Plan) -> str:
    """What would make a plan fit that does not: each flag is tried alone, then all that help together."""
    config = plan.config
    full = RecomputeConfig(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    changes: dict[str, dict[str, Any]] = {
        "--bf16": {"bf16": True},
        "--use-distributed-optimizer": {"use_distributed_optimizer": True},
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1": {"recompute": full},
        "--offload-teacher": {"offload_teacher": True},
        "--offload-teacher-hidden": {"offload_teacher_hidden": True},
        f"--rollout-batch-size {max(1, config.rollout_batch_size // 4)}": {
            "rollout_batch_size": max(1, config.rollout_batch_size // 4)
        },
    }

    if config.teacher_dtype == "fp8":
        del changes["--offload-teacher"]  # `train` cannot move weights that are stored in FP8
    changes = {
        flag: change
        for flag, change in changes.items()
        if any(getattr(config, name) != value for name, value in change.items())
    }

    def peak_with(change: dict[str, Any]) -> int:
        return make_plan(replace(config, **change), plan.student, plan.teacher).peak

    saved = {flag: plan.peak - peak_with(change) for flag, change in changes.items()}
    # A flag may help only after another has shrunk the fullest phase.
    together: dict[str, Any] = {}
    needed: list[str] = []
    for flag in sorted(changes, key=lambda flag: -saved[flag]):
        together |= changes[flag]
        needed.append(flag)
        if peak_with(together) <= plan.room:
            break
    rest = (peak_with(together) - plan.room) / GIB
    alone = "; ".join(f"{flag} saves {saved[flag] / GIB:.1f} GiB" for flag in needed if saved[flag] > 0)
    outcome = (
        f"it fits with {' '.join(needed)}"
        if rest <= 0
        else f"{'with all of these' if alone else 'no flag helps:'} {rest:.1f} GiB are still missing: more GPUs "
        "(larger TP, PP or EP), shorter responses, or GPUs of more memory"
    )
    return f"{(plan.peak - plan.room) / GIB:.1f} GiB too much" + (f"; {alone}" if alone else "") + f"; {outcome}"
