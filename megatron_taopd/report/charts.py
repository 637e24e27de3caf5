"""Which metrics share a plot: the catalogue of a run's curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_taopd.report.plots import Format


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A metric in a chart. A ``*`` in ``metric`` stands for one part of a name and appears in ``name``."""

    metric: str
    name: str
    dashed: bool = False
    band: tuple[str, str, str] | None = None
    """(lower metric, upper metric, what the band is)."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Metrics that share a plot; those that a run does not have are left out."""

    key: str
    title: str
    unit: str
    traces: Sequence[Trace]
    format: Format = "number"
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Charts under one heading."""

    title: str
    charts: Sequence[Chart] = field(default_factory=tuple)


def of(metric: str, name: str, *, dashed: bool = False) -> Trace:
    return Trace(metric=metric, name=name, dashed=dashed)


def with_range(metric: str, name: str, low: str, high: str) -> Trace:
    return Trace(metric=metric, name=name, band=(low, high, "5 % to 95 % of positions"))


QUARTERS = {"Q1": "Q1: unsure, far", "Q2": "Q2: unsure, near", "Q3": "Q3: sure, far", "Q4": "Q4: sure, near"}
"""By the student's entropy and its disagreement with the teacher, each against its median."""

GROUPS: tuple[Group, ...] = (
    Group(
        title="Learning",
        charts=(
            Chart(
                key="kl",
                title="KL(teacher ‖ student)",
                unit="nats a token, on each step's own responses",
                low=0,
                traces=(
                    of("kl_forward", "all positions"),
                    of("kept_kl_forward", "kept positions"),
                    of("teacher/*/kl_forward", "all positions of *"),
                ),
            ),
            Chart(
                key="loss",
                title="Loss",
                unit="a token that counts",
                traces=(of("loss", "loss"),),
            ),
            Chart(
                key="kl_reverse",
                title="KL(student ‖ teacher)",
                unit="nats a token",
                low=0,
                traces=(of("kl_reverse", "all positions"),),
            ),
        ),
    ),
    Group(
        title="Selection",
        charts=(
            Chart(
                key="keep_ratio",
                title="Share of positions kept",
                unit="of all response positions",
                format="percent",
                low=0,
                traces=(
                    of("keep_ratio", "kept"),
                    of("keep_ratio_asked", "budget", dashed=True),
                    of("teacher/*/keep_ratio", "of *"),
                ),
            ),
            Chart(
                key="keep_ratio_by_position",
                title="Share kept by place in the response",
                unit="of the positions there",
                format="percent",
                low=0,
                traces=(of("keep_ratio_by_position/*", "*"),),
            ),
            Chart(
                key="quadrant_share",
                title="Quarters of entropy and disagreement",
                unit="share of all positions",
                format="percent",
                low=0,
                traces=tuple(of(f"quadrant_share/{key}", name) for key, name in QUARTERS.items()),
            ),
            Chart(
                key="quadrant_keep_ratio",
                title="Share kept of each quarter",
                unit="of its positions",
                format="percent",
                low=0,
                traces=tuple(of(f"quadrant_keep_ratio/{key}", name) for key, name in QUARTERS.items()),
            ),
            Chart(
                key="kept_overlap",
                title="What other selectors would have kept",
                unit="share of the kept positions that both keep",
                format="percent",
                low=0,
                high=1,
                traces=(of("kept_overlap/*", "*"),),
            ),
            Chart(
                key="phases",
                title="Selection in force",
                unit="1 where it chose the positions",
                low=0,
                high=1,
                traces=(of("full_selector_warmup", "warm-up on full"), of("fallback", "fall-back", dashed=True)),
            ),
            Chart(
                key="threshold",
                title="Lowest score within the budget",
                unit="score",
                traces=(of("threshold", "of this batch"), of("carried_cut", "carried cut")),
            ),
            Chart(
                key="carried_agreement",
                title="Carried and global selection agree",
                unit="share of positions that both keep",
                format="percent",
                high=1,
                traces=(of("carried_agreement", "agreement"),),
            ),
            Chart(
                key="disagreement",
                title="Disagreement D",
                unit="nats",
                low=0,
                traces=(with_range("mean_D", "mean", "D_q05", "D_q95"), of("D_q50", "median", dashed=True)),
            ),
            Chart(
                key="compatibility",
                title="Compatibility C",
                unit="teacher's mass on the student's candidates",
                high=1,
                traces=(
                    with_range("mean_C", "mean", "C_q05", "C_q95"),
                    of("C_q50", "median", dashed=True),
                ),
            ),
            Chart(
                key="low_quantile",
                title="The lowest C: logarithm of its 5 % quantile",
                unit="0 is a probability of 1",
                high=0,
                traces=(of("log_C_q05", "log of C, 5 %"),),
            ),
            Chart(
                key="bound",
                title="Exact C above the bound of top-K lists",
                unit="mean difference of C",
                low=0,
                traces=(of("C_gap", "exact − bound"),),
            ),
            Chart(
                key="entropy",
                title="Entropy",
                unit="nats",
                low=0,
                traces=(
                    with_range("mean_H", "student, mean", "H_q05", "H_q95"),
                    of("teacher_entropy", "teacher, mean", dashed=True),
                ),
            ),
            Chart(
                key="shares",
                title="Is there something to select?",
                unit="share of positions",
                format="percent",
                low=0,
                high=1,
                traces=(
                    of("low_D_share", "D below 0.1 nats"),
                    of("low_C_share", "C below 0.5"),
                    of("teacher_top5_share", "token in the teacher's top 5"),
                ),
            ),
            Chart(
                key="overlap",
                title="Candidates of both models",
                unit="share",
                format="percent",
                high=1,
                traces=(
                    of("overlap", "common candidates"),
                    of("student_mass", "student's mass on its own", dashed=True),
                ),
            ),
        ),
    ),
    Group(
        title="Responses",
        charts=(
            Chart(
                key="response_length",
                title="Response length",
                unit="tokens",
                low=0,
                traces=(of("response_length", "mean"),),
            ),
            Chart(
                key="stop_share",
                title="Responses that end by themselves",
                unit="share of responses",
                format="percent",
                low=0,
                high=1,
                traces=(of("stop_share", "share"),),
            ),
            Chart(
                key="stop_tokens",
                title="Stop tokens",
                unit="of the positions; of the stop tokens",
                format="percent",
                low=0,
                traces=(of("stop_token_share", "share of positions"), of("stop_token_keep_ratio", "kept of them")),
            ),
            Chart(
                key="stop_token_teacher_logprob",
                title="The teacher on the student's stop tokens",
                unit="mean log-probability, nats",
                high=0,
                traces=(of("stop_token_teacher_logprob", "teacher"),),
            ),
        ),
    ),
    Group(
        title="Optimisation and time",
        charts=(
            Chart(
                key="grad_norm",
                title="Gradient norm",
                unit="before clipping",
                low=0,
                traces=(of("grad_norm", "norm"),),
            ),
            Chart(
                key="learning_rate",
                title="Learning rate",
                unit="",
                low=0,
                traces=(of("learning_rate", "rate"),),
            ),
            Chart(
                key="times",
                title="Time of a step",
                unit="seconds, of the slowest rank",
                low=0,
                traces=(
                    of("time_step", "all"),
                    of("time_rollout", "rollout"),
                    of("time_score", "scoring"),
                    of("time_train", "training"),
                ),
            ),
            Chart(
                key="tokens_per_second",
                title="Speed",
                unit="prompt and response tokens a second",
                low=0,
                traces=(of("tokens_per_second", "tokens/s"),),
            ),
        ),
    ),
)
