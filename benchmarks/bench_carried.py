"""--selection-scope carried and --score-from rollout beside the exact global selection, in real runs of taopd train.

The same recipe each time: seconds of a step's parts, and for the carried scope how many of the positions that it keeps
the global one keeps on the same batch (every second step, which is not timed).

    python examples/quickstart/prepare.py --out build/quickstart
    python benchmarks/bench_carried.py --models build/quickstart
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

RUNS = {
    "global": [],
    "global, --score-from rollout": ["--score-from", "rollout"],
    "carried": ["--selection-scope", "carried", "--carried-agreement-interval", "2"],
}


def train(args: argparse.Namespace, flags: list[str], folder: Path) -> list[dict[str, Any]]:
    """Metrics of every step of one run."""
    words = [
        *("--student", str(args.models / "student"), "--teacher", str(args.models / "teacher")),
        *("--prompt-data", str(args.models / "train_prompts.jsonl"), "--num-samples-per-prompt", "4"),
        *("--max-response-length", str(args.response_length), "--keep-ratio", str(args.keep_ratio)),
        *("--micro-batch-size", "4", "--global-batch-size", str(args.batch), "--train-iters", str(args.steps + 1)),
        *("--lr", "1e-5", "--log-dir", str(folder)),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_taopd", "train", *words, *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(common.ROOT)},
    )
    if done.returncode:
        raise SystemExit(f"taopd train {' '.join(flags)} failed:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def line(name: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The first step of a run, which the carried scope makes as the global one does, is left out."""
    steps = steps[1:]
    compared = [step["carried_agreement"] for step in steps if "carried_agreement" in step]
    timed = [step for step in steps if "carried_agreement" not in step]

    def median(key: str) -> float:
        return statistics.median(step[key] for step in timed)

    return {
        "run": name,
        "score": median("time_score"),
        "train": median("time_train"),
        "both": statistics.median(step["time_score"] + step["time_train"] for step in timed),
        "keep_ratio": statistics.mean(step["keep_ratio"] for step in steps),
        "agreement": statistics.mean(compared) if compared else None,
        "steps": steps,
    }


def main() -> None:
    parser = common.arguments(__doc__, threads=1, rounds=1)
    parser.add_argument("--models", type=Path, default=Path("build/quickstart"), help="made by prepare.py")
    parser.add_argument("--batch", type=int, default=8, help="responses a step")
    parser.add_argument("--response-length", type=int, default=48)
    parser.add_argument("--keep-ratio", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=6, help="steps after the first")
    args = parser.parse_args()
    common.start(args)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, flags) in enumerate(RUNS.items()):
            rows.append(line(name, train(args, flags, Path(folder) / str(number))))
    for row in rows:
        row["ratio"] = row["both"] / rows[0]["both"]
    table = common.Table(
        name="carried",
        title="Scoring without the student's extra forward",
        columns={
            "run": "taopd train",
            "score": "scoring, s",
            "train": "training, s",
            "both": "both, s",
            "ratio": "÷ global",
            "keep_ratio": f"kept (asked {args.keep_ratio:g})",
            "agreement": "agreement with global",
        },
        rows=rows,
        notes=[
            f"Batch {args.batch}, up to {args.response_length} tokens a response, median of {args.steps} steps after "
            "the first; live rollouts, so that runs drift apart. Agreement: positions that both keep on the same batch "
            "÷ the mean number that they keep."
        ],
    )
    common.finish([table], args, processes=1)


if __name__ == "__main__":
    main()
