"""Plans as text."""

from __future__ import annotations

from megatron_taopd.plan.gpus import GIB
from megatron_taopd.plan.planning import Plan, advice

_PARTS = (
    "parameters",
    "gradients",
    "optimizer",
    "teacher",
    "teacher_in_training",
    "teacher_hidden",
    "activations",
    "working",
    "statistics_chunks",
    "loss_chunks",
    "head_gradient",
    "kv_cache",
    "fp8_heads",
    "fp8_heads_in_rollout",
)


def plan_text(plan: Plan) -> str:
    """One plan: memory, traffic, times."""
    fullest = max(range(len(plan.stages)), key=lambda stage: plan.stages[stage].peak)
    memory = plan.stages[fullest]
    lines = [f"Memory of a GPU of stage {fullest}, the fullest (GiB)"]
    lines += [f"  {part.replace('_', ' '):<24}{getattr(memory, part) / GIB:>10.2f}" for part in _PARTS]
    lines += [f"  = in {phase:<19}{num_bytes / GIB:>10.2f}" for phase, num_bytes in memory.phases.items()]
    lines.append(f"  logits not held         {plan.stages[-1].logits_not_held / GIB:>10.2f}  (last stage)")
    lines += ["", "Sent by a GPU in a step (GB)"]
    lines += [f"  {t.phase:<8}{t.kind:<44}{t.num_bytes / 1e9:>10.3f}  {t.link}" for t in plan.traffic] or ["  nothing"]
    lines += ["", "Least time of a phase (s)", "             compute    memory   traffic    bubble     bound"]
    for phase, time in plan.times.items():
        numbers = (time.compute, time.memory, time.traffic, time.bubble, time.bound)
        lines.append(f"  {phase:<8}" + "".join(f"{number:>10.3f}" for number in numbers))
    room = f"{plan.peak / GIB:.1f} of {plan.room / GIB:.1f} GiB"
    lines += ["", f"It fits: {room}" if plan.fits else f"It does not fit: {room}; {advice(plan)}"]
    return "\n".join(lines)


def proposals_text(plans: list[Plan], *, most: int = 10) -> str:
    """The quickest layouts that fit as a Markdown table; where none does, the smallest and what would help."""
    if not plans:
        return "No layout divides these GPUs, models and batch: change --num-gpus or --global-batch-size"
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return f"No layout fits. The smallest, {layout_words(plans[0])}, has {advice(plans[0])}"
    lines = [
        f"{len(fitting)} of {len(plans)} layouts fit; the quickest:",
        "",
        "| layout | GiB of a GPU | rollout s | score s | train s | step s at least |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for plan in fitting[:most]:
        times = " | ".join(f"{time.bound:.1f}" for time in plan.times.values())
        lines.append(f"| {layout_words(plan)} | {plan.peak / GIB:.1f} | {times} | {plan.seconds:.1f} |")
    return "\n".join(lines)


def layout_words(plan: Plan) -> str:
    """Such as TP 4, PP 2, recompute."""
    parallel = plan.config.parallel
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
    }
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    words.append(f"DP {plan.config.num_gpus // parallel.model_parallel_size}")
    if plan.config.recompute.recompute_granularity == "full":
        words.append("recompute")
    return ", ".join(words)
