"""What a training run scored and kept, by response and position, as the last-stage ranks saw it."""

from __future__ import annotations

from megatron_taopd import cli
from megatron_taopd.training.carried import CarriedScope
from megatron_taopd.training.scopes import GlobalScope, Outcome

Kept = dict[tuple[int, int], tuple[bool, float]]
"""(response, position) -> (kept, score)."""


def run_and_record(words: list[str]) -> list[Kept]:
    """Run a command from its first step in this rank; one dictionary a step, empty off the last stage."""
    steps: list[Kept] = []
    originals = {scope: scope.after for scope in (GlobalScope, CarriedScope)}

    def recorded(self: GlobalScope | CarriedScope, *, step: int) -> Outcome:
        outcome = originals[type(self)](self, step=step)
        if len(steps) == step:  # a carried run makes its first step through the global scope
            steps.append(rows_of(outcome))
        return outcome

    for scope in originals:
        scope.after = recorded  # type: ignore[method-assign]
    try:
        cli.run(words)
    finally:
        for scope, original in originals.items():
            scope.after = original  # type: ignore[method-assign]
    return steps


def rows_of(outcome: Outcome) -> Kept:
    scored, selection = outcome.scored, outcome.selection
    if scored is None or selection is None:
        return {}
    columns = (scored.sample_index_R, scored.position_R, selection.keep, selection.score)
    return {
        (sample, position): (keep, score)
        for sample, position, keep, score in zip(*(c.tolist() for c in columns), strict=True)
    }


def merged(per_rank: list[list[Kept]]) -> list[Kept]:
    """All ranks' rows of each step; ranks that saw the same rows must have seen them alike."""
    steps: list[Kept] = []
    for parts in zip(*per_rank, strict=True):
        rows: Kept = {}
        for part in parts:
            for place, row in part.items():
                assert rows.setdefault(place, row) == row, f"ranks differ at {place}"
        steps.append(rows)
    return steps
