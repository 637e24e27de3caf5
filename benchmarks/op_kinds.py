"""Where the time of a call goes, by kind of operation, from torch.profiler.

An operation counts with the time spent in itself, not in those that it calls. What is left of the wall time, Python
between operations, is a kind of its own; the profiler makes it longer, so it is an upper bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from common import Table
from torch.profiler import ProfilerActivity, profile

KINDS: dict[str, tuple[str, ...]] = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "mkl_linear"),
    "attention": ("scaled_dot_product", "_scaled_dot_product", "_flash_attention"),
    "exp, softmax": ("exp", "log", "softmax", "log_softmax", "_softmax", "_log_softmax", "logsumexp", "softplus"),
    "subtract, multiply, add": ("sub", "mul", "add", "addcmul", "div", "neg", "rsub", "silu", "pow"),
    "reductions": (
        "sum",
        "amax",
        "max",
        "mean",
        "linalg_vecdot",
        "vecdot",
        "all",
        "any",
        "rms_norm",
        "_fused_rms_norm",
    ),
    "candidates, sampling": (
        *("topk", "sort", "nonzero", "ge", "gt", "le", "lt", "eq", "index_select", "gather", "bincount", "cumsum"),
        *("where", "index_put", "_index_put_impl", "index", "multinomial", "exponential", "argmax", "isin", "maximum"),
    ),
    "copies, new memory": (
        *("copy", "_to_copy", "cat", "stack", "clone", "fill", "zero", "constant_pad_nd", "contiguous", "index_add"),
        *("empty", "empty_like", "empty_strided", "new_empty", "resize", "repeat"),
    ),
}
"""Kind to the names of its operations in ATen, without the namespace and the underscore of the in-place form; those of
attention stand for all that begin so."""
OTHER, PYTHON = "other operations", "Python between them"
COLUMNS = (*KINDS, OTHER, PYTHON)
_PREFIXES = KINDS["attention"]
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}


def kind_of(operation: str) -> str:
    """The kind of an operation as the profiler names it, ``aten::mul_`` for instance."""
    if "::" not in operation or operation.startswith(("autograd::", "torch::autograd")):
        return PYTHON  # an autograd function, whose own time is that of its Python code
    name = operation.rsplit("::", 1)[-1]
    if name.startswith(_PREFIXES):
        return "attention"
    return _KIND_OF.get(name, _KIND_OF.get(name.removesuffix("_"), OTHER))


def seconds_by_kind(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one call by every one of :data:`COLUMNS`; call ``run`` once before, so that it is warm."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        started = time.perf_counter()
        run()
        wall = time.perf_counter() - started
    seconds = dict.fromkeys(COLUMNS, 0.0)
    for event in profiler.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    # What no operation has, and what functions of autograd had to themselves.
    seconds[PYTHON] += max(wall - sum(seconds.values()), 0.0)
    return seconds


def shares_row(first: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """A row of :func:`shares_table`: ``first``, the seconds in all, and per cent by kind."""
    total = sum(seconds.values())
    return {**first, "seconds": total, **{kind: 100 * value / total for kind, value in seconds.items()}}


def shares_table(name: str, title: str, first: dict[str, str], rows: Sequence[dict[str, Any]]) -> Table:
    """Per cent of the time by kind, a line a call; kinds that no line has are left out.

    Args:
        first: key and heading of the columns before.
    """
    seen = [kind for kind in COLUMNS if any(row[kind] >= 0.05 for row in rows)]
    columns = {**first, "seconds": "s, profiled", **{kind: f"{kind}, %" for kind in seen}}
    notes = ["Time spent in an operation itself, as torch.profiler counts it; the profiler slows Python down."]
    return Table(name=name, title=title, columns=columns, rows=list(rows), notes=notes)
