"""What a reader should look at before trusting a run: what it warned of itself, and what its numbers say."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from megatron_taopd.report.run_directory import RunDirectory
from megatron_taopd.report.scales import number


@dataclass(kw_only=True)
class Notice:
    """Something to look at."""

    level: Literal["warning", "note"]
    text: str
    source: str
    """``the run`` for what it logged, ``this report`` for what the numbers say."""


def notices(run: RunDirectory) -> list[Notice]:
    """Warnings first."""
    found = [*_logged(run), *_interruptions(run), *_numbers(run)]
    return sorted(found, key=lambda notice: notice.level != "warning")


def _logged(run: RunDirectory) -> list[Notice]:
    count = Counter(str(line.get("message")) for line in run.warnings)
    return [
        Notice(level="warning", text=text + (f" ({n} times)" if n > 1 else ""), source="the run")
        for text, n in count.items()
    ]


def _interruptions(run: RunDirectory) -> list[Notice]:
    found = []
    done, asked = int(run.metrics[-1]["iteration"]), run.config.get("train_iters")
    if isinstance(asked, int) and done < asked:
        found.append(_warn(f"The run has done {done} of {asked} iterations."))
    if run.torn:
        found.append(
            _note("The last line of metrics.jsonl is cut off, as a run that was killed leaves it; it is left out.")
        )
    missing = done - int(run.metrics[0]["iteration"]) + 1 - len(run.metrics)
    if missing:
        found.append(_warn(f"Iterations that metrics.jsonl lacks between its first and its last: {missing}."))
    if len(run.starts) > 1:
        versions = [start.get("versions") for start in run.starts]
        changed = (
            "with other versions of packages" if any(v != versions[0] for v in versions) else "with the same versions"
        )
        found.append(_note(f"The run was started {len(run.starts)} times, {changed}."))
    return found


def _numbers(run: RunDirectory) -> list[Notice]:
    found = []
    skipped = int(sum(v for v in run.series("skipped") if math.isfinite(v)))
    if skipped:
        found.append(
            _warn(f"{skipped} of {len(run.metrics)} steps were refused by the optimizer (a gradient was not finite).")
        )
    watched = ("loss", "grad_norm", "kl_forward")
    odd = [name for name in watched if any(not math.isfinite(line.get(name, 0.0)) for line in run.metrics)]
    if odd:
        found.append(_warn(f"Not a finite number in some iterations: {', '.join(odd)}."))
    kept, asked = _mean(run, "keep_ratio"), _mean(run, "keep_ratio_asked")
    if kept > 1.2 * asked:
        found.append(
            _warn(
                f"{number(kept, 'percent')} of the positions were kept, the budget is {number(asked, 'percent')}: with "
                "responses about as short as 1/budget, each response's minimum (--min-keep-per-sample) selects more "
                "than the scores do."
            )
        )
    if _mean(run, "low_C_share") < 0.02:
        found.append(
            _note(
                f"C is below 0.5 at {number(_mean(run, 'low_C_share'), 'percent')} of the positions: the teacher's "
                "mass lies on the student's candidates almost everywhere, so that scaling C by its quantiles stretches "
                "small differences."
            )
        )
    length = [v for v in run.series("response_length") if math.isfinite(v)]
    if len(length) >= 8 and _tail(length) < 0.5 * _head(length):
        found.append(
            _warn(
                f"Responses became shorter: {number(_head(length))} tokens at first, {number(_tail(length))} at last."
            )
        )
    kl = [v for v in run.series("kl_forward") if math.isfinite(v)]
    if len(kl) >= 8 and _tail(kl) >= _head(kl):
        found.append(
            _warn(
                f"KL(teacher ‖ student) did not fall: {number(_head(kl))} nats over the first quarter of the run, "
                f"{number(_tail(kl))} over the last. Each step has responses of its own; held-out contexts tell more."
            )
        )
    return found


def _mean(run: RunDirectory, name: str) -> float:
    """NaN, which no comparison holds for, where there is no number."""
    finite = [v for v in run.series(name) if math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _head(values: list[float]) -> float:
    part = values[: len(values) // 4]
    return math.fsum(part) / len(part)


def _tail(values: list[float]) -> float:
    return _head(values[::-1])


def _warn(text: str) -> Notice:
    return Notice(level="warning", text=text, source="this report")


def _note(text: str) -> Notice:
    return Notice(level="note", text=text, source="this report")
