"""Kill a training run at many moments, start it again, compare numbers and weights with an undisturbed run's, bitwise.

    python tools/kill_at_any_moment.py --out DIR [--moments 20]

Real processes: ``python -m megatron_taopd.torchrun`` with two ranks, a tiny random pair of models, generation by the
live student, the distributed optimizer, the carried selection scope, a checkpoint every two iterations, written in the
background in half of the runs. SIGKILL hits rank 0, rank 1, torchrun, or everything at once, as a lost machine would.
Prints a Markdown table; exits 1 if a run ends otherwise than the undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import statistics
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
SURVIVES = 120.0  # seconds; ranks look for their torchrun every ten
VICTIMS = ("rank 0", "rank 1", "torchrun", "all")
TIMES = ("time_rollout", "time_score", "time_train", "time_step", "tokens_per_second")


@dataclass(kw_only=True)
class Attempt:
    """One kill and what came of it."""

    moment: float
    """Steps after the start: 3.4 is two fifths of a step's time after the third. Below 0 the ranks are starting; from
    ``ITERATIONS`` on they save, export and end."""
    seconds: float
    """After the start."""
    doing: str
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


def start(root: Path, out: Path, log: Path, *further: str, in_background: bool) -> subprocess.Popen:
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
        *further,
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


def rank_of(process: psutil.Process) -> str | None:
    """Of a process that torchrun started."""
    with contextlib.suppress(psutil.Error):
        return process.environ().get("RANK")
    return None


def kill(process: subprocess.Popen, victim: str) -> str:
    """SIGKILL; returns what was hit. Where torchrun itself is hit, nothing ends its ranks but that they notice."""
    everything = family(process)
    ranks = {f"rank {rank_of(child)}": child for child in psutil.Process(process.pid).children()}
    if victim == "torchrun":
        chosen = everything[:1]
    elif victim in ranks:
        chosen = [ranks[victim]]
    else:
        chosen = everything
        if victim != "all":
            victim = f"all (there was no {victim})"
    for one in chosen:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    return victim


def running(out: Path, known: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Which of the known processes, and of all that name the run's directory, have not ended."""
    found = []
    for one in {*known, *psutil.process_iter()}:
        with contextlib.suppress(psutil.Error):
            ours = one in known or any(word.endswith(f"={out / 'checkpoints'}") for word in one.cmdline())
            # One that ended and that nobody has asked for its status is still listed.
            if ours and one.is_running() and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
    return found


def wait_for_all(out: Path, known: Sequence[psutil.Process]) -> None:
    """Until nothing of the run is left.

    Raises:
        RuntimeError: something survives; it is ended first.
    """
    deadline = time.monotonic() + SURVIVES
    while survivors := running(out, known):
        if time.monotonic() > deadline:
            names = [f"{one.pid}: {' '.join(one.cmdline())}" for one in survivors]
            for one in survivors:
                one.kill()
            raise RuntimeError(f"still running {SURVIVES} s after the kill: {names}")
        time.sleep(0.05)


def seen(out: Path) -> str:
    """What a run is doing, by the files it makes aside."""
    if list((out / "checkpoints").glob(".iter_*.partial-*")):
        return "saving"
    if list(out.glob(".hf.*.partial")):
        return "exporting"
    done = steps_done(out)
    return "training" if 0 < done < ITERATIONS else "ending" if done else "starting"


def numbers(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(out: Path) -> str:
    return hashlib.sha256((out / "hf" / "model.safetensors").read_bytes()).hexdigest()


def attempt(
    root: Path,
    straight: Path,
    out: Path,
    *,
    moment: float,
    start_time: float,
    end_time: float,
    victim: str,
    in_background: bool,
) -> Attempt | None:
    """Kill, start again, compare; None where the run was over before the moment came."""
    out.mkdir()
    process = start(root, out, out / "log.txt", in_background=in_background)
    began_first = time.monotonic()
    while steps_done(out) < math.floor(moment) and process.poll() is None:
        time.sleep(0.002)
    seconds = start_time if moment < 0 else end_time if moment >= ITERATIONS else step_time(out)
    time.sleep((moment % 1) * seconds)
    known, doing = family(process), seen(out)
    if process.poll() is not None:
        assert process.returncode == 0, (out / "log.txt").read_text()
        return None
    killed = time.monotonic()
    hit = kill(process, victim)
    status = process.wait()
    wait_for_all(out, known)
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
        doing=doing,
        victim=hit,
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
        "| at step | after | while | killed | checkpoints | steps done | newest checkpoint | all ended after | status "
        "| next step after | same numbers and weights |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in attempts:
        saving = "background" if one.in_background else "foreground"
        lines.append(
            f"| {one.moment:.2f} | {one.seconds:.1f} s | {one.doing} | {one.victim} | {saving} | {one.steps_done} "
            f"| {one.saved} | {one.noticed:.1f} s | {one.status} | {one.recovered:.1f} s "
            f"| {'yes' if one.same else '**no**'} |"
        )
    return "\n".join(lines)


def summary(attempts: Sequence[Attempt]) -> str:
    """One line of all of them."""
    noticed, recovered = [one.noticed for one in attempts], [one.recovered for one in attempts]
    again = max(one.steps_done - one.saved for one in attempts)
    return (
        f"{len(attempts)} moments, {sum(one.same for one in attempts)} with the undisturbed numbers and weights; at "
        f"most {again} steps made again; all processes ended after {statistics.median(noticed):.1f} s (median; at most "
        f"{max(noticed):.1f} s); next new step, or the end, {statistics.median(recovered):.1f} s after the next start "
        f"(median; at most {max(recovered):.1f} s)"
    )


def moments(count: int, draw: random.Random) -> list[float]:
    """One in ten while the ranks start, one in seven after the last step, the others evenly over the steps."""
    starting, ending = max(1, round(count / 10)), max(1, round(count / 7))
    training = count - starting - ending
    return [
        *(draw.uniform(-1.0, 0.0) for _ in range(starting)),
        *(1 + (ITERATIONS - 1) * (index + draw.random()) / training for index in range(training)),
        *(ITERATIONS + (index + draw.random()) / ending for index in range(ending)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--moments", type=int, default=20, help="at least 3")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    if options.moments < 3:
        parser.error(f"--moments {options.moments}: one while it starts, one while it trains and one at the end are 3")
    root: Path = options.out
    root.mkdir(parents=True)
    make_inputs(root)
    straight = root / "straight"
    straight.mkdir()
    began, first_step, last_step = time.monotonic(), math.nan, math.nan
    process = start(root, straight, straight / "log.txt", in_background=False)
    while process.poll() is None:
        done, now = steps_done(straight), time.monotonic() - began
        if done and math.isnan(first_step):
            first_step = now
        if done == ITERATIONS and math.isnan(last_step):
            last_step = now
        time.sleep(0.02)
    duration = time.monotonic() - began
    assert process.returncode == 0, (straight / "log.txt").read_text()
    print(
        f"undisturbed: first step after {first_step:.1f} s, {ITERATIONS} steps after {last_step:.1f} s, last save and "
        f"export after {duration:.1f} s\n",
        flush=True,
    )
    attempts: list[Attempt] = []
    for index, moment in enumerate(moments(options.moments, random.Random(options.seed))):
        out, made = root / f"moment_{index:02d}", None
        while made is None:
            shutil.rmtree(out, ignore_errors=True)
            made = attempt(
                root,
                straight,
                out,
                moment=moment,
                start_time=first_step,
                end_time=duration - last_step,
                victim=VICTIMS[index % len(VICTIMS)],
                in_background=(index + index // len(VICTIMS)) % 2 == 1,
            )
            moment -= (moment % 1) / 2  # it was over: earlier, then
        attempts.append(made)
        print(table(attempts[-1:]).splitlines()[-1], flush=True)
        if attempts[-1].same:
            shutil.rmtree(out)
    print("\n" + table(sorted(attempts, key=lambda one: one.moment)))
    print("\n" + summary(attempts))
    return 0 if all(one.same for one in attempts) else 1


if __name__ == "__main__":
    sys.exit(main())
