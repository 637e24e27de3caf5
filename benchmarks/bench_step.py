"""Whole on-policy steps (sample, read by the teacher, loss, backward, AdamW) on a real model: ours against TRL.

The same prompts, response length, batch, processes, threads; fp32; reverse KL at temperature 1. Both directories are
copied with a stop token that is never drawn, so that every response has the full length. The sides take turns, each
in processes of its own; the first step of each is left out.

    python examples/quickstart/prepare.py --out build/quickstart
    python benchmarks/bench_step.py --models build/quickstart
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

OURS = {
    "ours, ρ = 0.1": ["--keep-ratio", "0.1"],
    "ours, ρ = 0.1, --score-from rollout": ["--keep-ratio", "0.1", "--score-from", "rollout"],
    "ours, every position": ["--selector", "full"],
}
TRL = ("TRL GKDTrainer", "TRL DistillationTrainer")
NEVER_DRAWN = "<empty_output>"
"""A special token of SmolLM2 that the models hardly ever give any probability."""


def without_stops(source: Path, target: Path, stop: str) -> Path:
    """An HF directory with the same weights and another stop token."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".json" or file.name == "tokenizer.json":
            (target / file.name).symlink_to(file.resolve())
            continue
        (target / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    added = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    if stop not in ids:
        raise SystemExit(f"{source} has no special token {stop}; name one of {', '.join(ids)} with --stop-token")
    for name in ("config.json", "generation_config.json"):
        edit(target / name, eos_token_id=ids[stop])
    edit(target / "tokenizer_config.json", eos_token=stop)
    return target


def edit(path: Path, **fields: Any) -> None:
    if path.exists():
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def run_side(side: str, processes: int, settings: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Train on fresh ranks; what each rank wrote."""
    scratch = Path(tempfile.mkdtemp(dir=folder))
    told = {**settings, "side": side, "processes": processes, "flags": OURS.get(side, []), "scratch": str(scratch)}
    (scratch / "settings.json").write_text(json.dumps(told))
    script = [str(Path(__file__).with_name("step_runs.py")), str(scratch / "settings.json")]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    log = scratch / "log"
    with log.open("w") as stream:
        done = subprocess.run(
            [sys.executable, *torchrun, *script],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(settings["threads"]),
                "PYTHONPATH": os.pathsep.join(filter(None, [str(common.ROOT), os.environ.get("PYTHONPATH")])),
                "HF_HUB_OFFLINE": "1",
            },
        )
    if done.returncode:
        raise SystemExit(f"{side} on {processes} processes failed:\n{log.read_text()[-4000:]}")
    return [json.loads((scratch / f"rank{rank}.json").read_text()) for rank in range(processes)]


def summary(side: str, processes: int, runs: list[list[dict[str, Any]]], clock: str) -> dict[str, Any]:
    """One line: the median step over all runs, the first step of each left out."""
    steps: list[dict[str, float]] = []
    for ranks in runs:
        for of_ranks in zip(*(rank["steps"][1:] for rank in ranks), strict=True):
            # A step is over when its slowest rank is.
            names = set.intersection(*(set(step) for step in of_ranks))
            steps.append({name: max(step[name] for step in of_ranks) for name in names})

    def median(name: str) -> float | None:
        values = [step[name] for step in steps if name in step]
        return statistics.median(values) if values else None

    seconds, rollout = median(clock), median("rollout_wall")
    assert seconds is not None
    wall = median("wall")
    score = median("score_wall")
    return {
        "contender": side,
        "processes": processes,
        "seconds": seconds,
        "best": min(step[clock] for step in steps),
        "tokens_per_second": median("tokens") / seconds,
        "rollout": rollout,
        "score": score,
        "rest": wall - (rollout or 0.0) - (score or 0.0),
        "peak_mib": max(sum(rank["peak_bytes"] for rank in ranks) for ranks in runs) / common.MIB,
        "steps": steps,
    }


def measure(args: argparse.Namespace, folder: Path) -> common.Table:
    settings = {
        "student": str(without_stops(args.models / "student", folder / "student", args.stop_token)),
        "teacher": str(without_stops(args.models / "teacher", folder / "teacher", args.stop_token)),
        "prompts": str((args.models / "train_prompts.jsonl").resolve()),
        "batch": args.batch,
        "response_length": args.response_length,
        "steps": args.steps + 1,
        "lr": 1e-6,
        "threads": args.threads,
    }
    reason = common.missing_peer("trl", "datasets", "accelerate")
    sides = [
        side for side in (*OURS, *([] if reason else TRL)) if args.only is None or any(p in side for p in args.only)
    ]
    rows = []
    for processes in args.processes:
        runs: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                runs[side].append(run_side(side, processes, settings, folder))
        lines = [summary(side, processes, runs[side], args.clock) for side in sides]
        peers = [line["tokens_per_second"] for line in lines if line["contender"] in TRL]
        for line in lines:
            line["ratio"] = line["tokens_per_second"] / max(peers) if peers else None
        rows += lines
    notes = [
        f"Batch {args.batch}, {args.response_length} tokens a response, {args.steps} steps measured in each of "
        f"{args.rounds} runs a side; {args.clock} time of the slowest rank, {args.threads} thread(s) a process. Parts "
        "are wall seconds; TRL reads with the teacher inside the rest. Peak is the resident set of all ranks together, "
        "models and optimizer included."
    ]
    if reason:
        notes.append(f"TRL left out: {reason}.")
    return common.Table(
        name="step",
        title="Whole on-policy step",
        columns={
            "contender": "trainer",
            "processes": "processes",
            "tokens_per_second": "response tokens/s",
            "ratio": "÷ faster TRL",
            "seconds": "s a step",
            "rollout": "rollout",
            "score": "scoring",
            "rest": "rest",
            "peak_mib": "peak MiB",
        },
        rows=rows,
        notes=notes,
    )


def main() -> None:
    parser = common.arguments(__doc__, threads=1, rounds=2)
    parser.add_argument("--models", type=Path, default=Path("build/quickstart"), help="made by prepare.py")
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--batch", type=int, default=8, help="responses a step, over all processes")
    parser.add_argument("--response-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a run")
    parser.add_argument("--stop-token", default=NEVER_DRAWN)
    parser.add_argument("--only", nargs="+", help="sides whose name has one of these")
    args = parser.parse_args()
    common.start(args)
    if not (args.models / "student").exists():
        prepare = shlex.join(["python", "examples/quickstart/prepare.py", "--out", str(args.models)])
        raise SystemExit(f"{args.models} has no student and teacher; make them with: {prepare}")
    with tempfile.TemporaryDirectory() as folder:
        common.finish([measure(args, Path(folder))], args, processes=max(args.processes))


if __name__ == "__main__":
    main()
