"""A metric as a line the height of its row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from megatron_taopd.report.scales import Scale, spread

WIDTH, HEIGHT, POINTS = 120, 20, 60


def sparkline(values: Sequence[float]) -> Markup:
    """An ``<svg>`` without words; empty where there are fewer than two numbers."""
    size = max(1, math.ceil(len(values) / POINTS))
    parts = [[v for v in values[i : i + size] if math.isfinite(v)] for i in range(0, len(values), size)]
    means = [(i, math.fsum(part) / len(part)) for i, part in enumerate(parts) if part]
    if len(means) < 2:
        return Markup("")
    low, high = spread([v for _, v in means])
    y = Scale(low=low, high=high if high > low else low + 1, start=HEIGHT - 3, end=3)
    x = Scale(low=0, high=len(parts) - 1, start=2, end=WIDTH - 2)
    d = "M" + "L".join(f"{x(i):.0f} {y(v):.1f}" for i, v in means)
    return Markup('<svg class="spark" viewBox="0 0 {} {}" aria-hidden="true"><path d="{}"/></svg>').format(
        WIDTH, HEIGHT, d
    )
