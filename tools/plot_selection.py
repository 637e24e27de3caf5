"""Draw a score table: every response position in the plane of disagreement and compatibility, kept ones in colour.

python tools/plot_selection.py build/quickstart/before.parquet --output docs/selection.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow.parquet as pq

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(table: Path, output: Path) -> None:
    """Write the picture of a ``.parquet`` score table."""
    columns = pq.read_table(table, columns=["D", "C", "D_norm", "C_norm", "score", "keep"]).to_pydict()
    d, c, score = (np.array(columns[name]) for name in ("D_norm", "C_norm", "score"))
    keep = np.array(columns["keep"], dtype=bool)
    figure, (plane, spread) = plt.subplots(1, 2, figsize=(10, 4.2))

    axis = np.linspace(0.01, 1, 200)
    contours = plane.contour(
        axis,
        axis,
        axis[:, None] * axis[None, :],
        levels=[0.1, 0.3, 0.5, 0.7, 0.9],
        colors="0.8",
        linewidths=0.8,
    )
    plane.clabel(contours, fmt="%.1f", fontsize=7)
    plane.scatter(d[~keep], c[~keep], s=6, color="tab:gray", alpha=0.5, label=f"not kept ({(~keep).sum()})")
    plane.scatter(d[keep], c[keep], s=10, color="tab:red", label=f"kept ({keep.sum()})")
    plane.set(
        xlabel="disagreement, normalised (D̃)",
        ylabel="teacher mass on the student's top-K, normalised (C̃)",
        title="every response position; lines of equal D̃·C̃",
    )
    plane.legend(loc="lower center", bbox_to_anchor=(0.5, 1.08), ncols=2, frameon=False, fontsize=8)

    bins = np.linspace(0, max(score.max(), 1e-9), 40)
    spread.hist([score[keep], score[~keep]], bins=bins, stacked=True, color=["tab:red", "tab:gray"])
    spread.set(yscale="log", xlabel="score", ylabel="positions", title="scores; the budget keeps the highest")
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="score table of `taopd score` (.parquet)")
    parser.add_argument(
        "--output", type=Path, default=Path("selection.png"), help="picture to write (.png, .svg, .pdf)"
    )
    args = parser.parse_args()
    draw(args.table, args.output)


if __name__ == "__main__":
    main()
