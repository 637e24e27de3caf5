"""Kill a training run at many moments, start it again, compare numbers and weights with an undisturbed run's, bitwise.

    python tools/kill_at_any_moment.py --out DIR [--moments 20]

Real processes: ``python -m megatron_taopd.torchrun`` with two ranks, a tiny random pair of models, generation by the
live student, the distributed optimizer, the carried selection scope, a checkpoint every two iterations, written in the
background in half of the runs. SIGKILL hits rank 0, rank 1, torchrun, or everything at once, as a lost machine would.
Prints a Markdown table; exits 1 if a run ends otherwise than the undisturbed one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_taopd.checkpoint.layout import read_latest_iteration
from megatron_taopd.testing.tiny_models import save_tiny_hf_model

ITERATIONS = 24
SAVE_INTERVAL = 2
RANKS = 2
VICTIMS = ("rank 0", "rank 1", "torchrun", "all")
TIMES = ("time_rollout", "time_score", "time_train", "time_step", "tokens_per_second")


@dataclass(kw_only=True)
class Attempt:
    """One kill and what came of it."""

    moment: float
    """Steps after the start: 3.4 is two fifths of a step's time after the third; below 0 the ranks are starting."""
    seconds: float
    """After the start."""
    victim: str
    in_background: bool
    steps_done: int
    saved: int
    noticed: float
    """Seconds from the kill to the end of all processes."""
    status: int
    recovered: float
    """Seconds from the next start to the first step beyond those done before (or to the end, if all were done)."""
    same: bool


def make_inputs(root: Path) -> None:
    sizes = {"hidden_size": 64, "num_layers": 2, "vocab_size": 509}
    save_tiny_hf_model(root / "student", "qwen3", **sizes, seed=1)
    save_tiny_hf_model(root / "teacher", "qwen3", **{**sizes, "hidden_size": 96}, seed=2)
    prompts = [{"id": f"p{i}", "prompt_tokens": [3 + i, 40 + i, 100 + i]} for i in range(50)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def start(root: Path, out: Path, log: Path, *, in_background: bool) -> subprocess.Popen:
    words = [
        *(sys.executable, "-m", "megatron_taopd.torchrun", "--standalone", f"--nproc-per-node={RANKS}"),
        *("-m", "megatron_taopd", "train"),
        *(f"--student={root / 'student'}", f"--teacher={root / 'teacher'}", f"--prompt-data={root / 'prompts.jsonl'}"),
        *("--max-response-length=24", "--global-batch-size=8", f"--train-iters={ITERATIONS}"),
        *("--selection-scope=carried", "--keep-ratio=0.2", "--lr=1e-3", "--lr-decay-style=cosine"),
        *("--use-distributed-optimizer", f"--save-interval={SAVE_INTERVAL}", "--keep-last-checkpoints=2"),
        *(f"--save={out / 'checkpoints'}", f"--load={out / 'checkpoints'}"),
        *(f"--log-dir={out}", f"--export-hf={out / 'hf'}"),
        *(("--async-save",) if in_background else ()),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as stream:
        return subprocess.Popen(words, stdout=stream, stderr=stream, env=environment, start_new_session=True)


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def step_time(out: Path) -> float:
    """Seconds of the last step and of what followed it, roughly."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return 1.5 * json.loads(lines[-1])["time_step"] if lines else 1.0


def family(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(process: subprocess.Popen, victim: str) -> None:
    """SIGKILL; where torchrun itself is hit, nothing ends its ranks but that they notice."""
    everything = family(process)
    ranks = sorted(psutil.Process(process.pid).children(), key=lambda rank: rank.pid)
    chosen = {"torchrun": everything[:1], "all": everything}.get(victim)
    if chosen is None:
        chosen = ranks[int(victim.removeprefix("rank ")) :][:1] or everything
    for one in chosen:
        one.kill()


def numbers(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(out: Path) -> str:
    return hashlib.sha256((out / "hf" / "model.safetensors").read_bytes()).hexdigest()


def attempt(
    root: Path, straight: Path, out: Path, *, moment: float, start_time: float, victim: str, in_background: bool
) -> Attempt:
    out.mkdir()
    process = start(root, out, out / "log.txt", in_background=in_background)
    began_first = time.monotonic()
    while steps_done(out) < math.floor(moment) and process.poll() is None:
        time.sleep(0.002)
    time.sleep((moment % 1) * (step_time(out) if moment >= 0 else start_time))
    assert process.poll() is None, "it was over before it was killed"
    ranks = family(process)
    killed = time.monotonic()
    kill(process, victim)
    status = process.wait()
    psutil.wait_procs(ranks, timeout=120)
    noticed = time.monotonic() - killed
    done, saved = steps_done(out), read_latest_iteration(out / "checkpoints") or 0

    process = start(root, out, out / "log.txt", in_background=in_background)
    began, recovered = time.monotonic(), None
    while process.poll() is None:
        if recovered is None and steps_done(out) > done:
            recovered = time.monotonic() - began
        time.sleep(0.01)
    recovered = time.monotonic() - began if recovered is None else recovered
    same = process.wait() == 0 and numbers(out) == numbers(straight) and weights(out) == weights(straight)
    return Attempt(
        moment=moment,
        seconds=killed - began_first,
        victim=victim,
        in_background=in_background,
        steps_done=done,
        saved=saved,
        noticed=noticed,
        status=status,
        recovered=recovered,
        same=same,
    )


def table(attempts: Sequence[Attempt]) -> str:
    lines = [
        "| at step | after | killed | saving | steps done | newest checkpoint | all ended after | status | next step "
        "after | same numbers and weights |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in attempts:
        saving = "background" if one.in_background else "foreground"
        lines.append(
            f"| {one.moment:.2f} | {one.seconds:.1f} s | {one.victim} | {saving} | {one.steps_done} | {one.saved} "
            f"| {one.noticed:.1f} s | {one.status} | {one.recovered:.1f} s | {'yes' if one.same else '**no**'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    root: Path = options.out
    root.mkdir(parents=True)
    make_inputs(root)
    straight = root / "straight"
    straight.mkdir()
    began, first_step = time.monotonic(), None
    process = start(root, straight, straight / "log.txt", in_background=False)
    while process.poll() is None:
        if first_step is None and steps_done(straight):
            first_step = time.monotonic() - began
        time.sleep(0.05)
    duration = time.monotonic() - began
    assert process.returncode == 0 and first_step is not None, (straight / "log.txt").read_text()
    print(f"undisturbed: first step after {first_step:.1f} s, {ITERATIONS} steps and export after {duration:.1f} s\n")
    draw, attempts = random.Random(options.seed), []
    for index in range(options.moments):
        # Nine in ten while it trains, the others while it starts.
        steps = index % 10 * ITERATIONS / 10
        earliest, latest = (max(steps - ITERATIONS / 10, 1.0), steps) if index % 10 else (-1.0, 0.0)
        out = root / f"moment_{index:02d}"
        attempts.append(
            attempt(
                root,
                straight,
                out,
                moment=draw.uniform(earliest, latest),
                start_time=first_step,
                victim=VICTIMS[index % len(VICTIMS)],
                in_background=index // len(VICTIMS) % 2 == 1,
            )
        )
        print(table(attempts[-1:]).splitlines()[-1], flush=True)
        if attempts[-1].same:
            shutil.rmtree(out)
    print("\n" + table(sorted(attempts, key=lambda one: one.moment)))
    return 0 if all(one.same for one in attempts) else 1


if __name__ == "__main__":
    sys.exit(main())
