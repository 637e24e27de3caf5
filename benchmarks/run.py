"""All benchmarks, one process after the other, and the table of targets.

    python benchmarks/run.py --short    under ten minutes on two cores
    python benchmarks/run.py --full     the shapes of docs/benchmarks.md; about 45 minutes on two cores

Writes results.md and results.json after each benchmark; what is there of an earlier run is replaced, benchmark by
benchmark. Seconds of each stand in the table "Duration".
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import common
from report import markdown
from targets import targets_table

HERE = Path(__file__).parent


class Job(NamedTuple):
    """One benchmark and its arguments."""

    script: str
    short: str
    full: str
    minutes: tuple[float, float] = (1.0, 1.0)
    """Of the short and the full form on two cores that do nothing else, about."""


JOBS = {
    "score": Job(
        "bench_score.py",
        "--shapes 512,512,1024,32768 512,576,576,49152 --rounds 3 --floor-rows 128 512",
        "--rounds 3 --budget 60 --floor-rows 256 512 1024",
        (1.0, 8.0),
    ),
    "loss": Job(
        "bench_loss.py",
        "--shapes 256,512,1024,32768 --rounds 2 --logits-chunk-bytes 8388608 "
        "--only 'ours, ρ = 1' 'ρ = 0.05' TRL 'Liger compiled, our' 'two products'",
        "--rounds 2 --budget 120",
        (2.0, 16.0),
    ),
    "profile": Job("bench_profile.py", "--shapes 256,512,1024,32768", "", (0.3, 1.0)),
    "tp": Job(
        "bench_tp.py",
        "--shapes 256,128,256,8192 256,128,256,16384 --ranks 1 2 4 --rounds 2",
        "--support-k 8 16 --rounds 2",
        (0.5, 1.0),
    ),
    "growth": Job(
        "bench_growth.py",
        "--base 256,64,128,16384 --factors 1 4 --ranks 1 2 --rounds 1",
        "--base 1024,128,256,16384 --factors 1 2 4 --rounds 2",
        (0.7, 2.5),
    ),
    "step": Job(
        "bench_step.py",
        "--processes 1 --batch 4 --response-length 32 --steps 1 --rounds 1 --only 'ours, ρ = 0.1' TRL",
        "--processes 1 2 --batch 8 --response-length 48 --steps 2 --rounds 1",
        (2.4, 9.0),
    ),
    "carried": Job(
        "bench_carried.py", "--batch 4 --response-length 16 --steps 2", "--response-length 32 --steps 6", (1.0, 3.0)
    ),
    "rollout": Job(
        "bench_rollout.py",
        "--batch 4 --new-tokens 8 --rounds 1 --cases 'full length' 'early stops'",
        "--batch 16 --new-tokens 24 --rounds 2",
        (1.0, 5.5),
    ),
    "convert": Job("bench_convert.py", "--gigabytes 0.6", "--gigabytes 2", (0.3, 1.0)),
}
DURATION = "duration"


def run_job(name: str, words: list[str], out: Path) -> list[common.Table] | str:
    """The tables of one benchmark, or why there are none."""
    json_path = out / f"{name}.json"
    json_path.unlink(missing_ok=True)
    told = [*words, "--out", str(json_path)]
    script = str(HERE / JOBS[name].script)
    done = subprocess.run([sys.executable, script, *told], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return f"exit code {done.returncode}: {done.stderr.strip()[-2000:]}"
    answer = json.loads(json_path.read_text(encoding="utf-8"))
    for table in answer:
        table["command"] = command(name, words)
    return [common.Table(**table) for table in answer]


def command(name: str, words: list[str]) -> str:
    return shlex.join(["python", f"benchmarks/{JOBS[name].script}", *words])


def earlier_tables(out: Path) -> list[common.Table]:
    """What an earlier run has left."""
    results = out / "results.json"
    found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else []
    return [common.Table(**table) for table in found if table["name"] != "targets"]


def with_answer(
    tables: list[common.Table], name: str, answer: list[common.Table], seconds: float
) -> list[common.Table]:
    """The tables with those of one benchmark replaced, and its seconds in the last of them."""
    known = {row["benchmark"]: row["seconds"] for table in tables if table.name == DURATION for row in table.rows[:-1]}
    known[name] = seconds
    rows = [{"benchmark": name, "seconds": known[name]} for name in JOBS if name in known]
    rows.append({"benchmark": "in all", "seconds": sum(known.values())})
    duration = common.Table(DURATION, "Duration", {"benchmark": "benchmark", "seconds": "s"}, rows)
    return [table for table in tables if table.name.split("/")[0] not in (name, DURATION)] + [*answer, duration]


def write(tables: list[common.Table], out: Path) -> str:
    """Targets and all tables to results.json and results.md, whose text is returned."""
    data = [asdict(table) for table in [targets_table(tables), *tables]]
    (out / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    text = markdown(data)
    (out / "results.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--short", action="store_true", help="reduced shapes")
    length.add_argument("--full", action="store_true", help="the shapes of the documentation")
    parser.add_argument("--only", nargs="+", choices=list(JOBS), default=list(JOBS), help="benchmarks to run")
    parser.add_argument("--models", type=Path, default=None, help="made by examples/quickstart/prepare.py")
    parser.add_argument("--threads", type=int, default=None, help="of torch in every process (default: each script's)")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), help="folder of the results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    failed = {}
    tables = earlier_tables(args.out)
    minutes = {name: JOBS[name].minutes[not args.short] for name in args.only}
    print(f"== about {sum(minutes.values()):.0f} minutes on two cores that do nothing else", flush=True)
    for number, name in enumerate(args.only):
        words = shlex.split(JOBS[name].short if args.short else JOBS[name].full)
        if name in ("step", "carried") and args.models is not None:
            words += ["--models", str(args.models)]
        if args.threads is not None and name != "convert":  # which is about files
            words += ["--threads", str(args.threads)]
        left = sum(minutes[later] for later in args.only[number:])
        print(f"== {number + 1} of {len(args.only)}, about {minutes[name]:.1f} of {left:.0f} minutes left", flush=True)
        print(f"== {command(name, words)}", flush=True)
        started = time.perf_counter()
        answer = run_job(name, words, args.out)
        seconds = time.perf_counter() - started
        print(f"== {seconds:.0f} s", flush=True)
        if isinstance(answer, str):
            failed[name] = answer
            print(answer, file=sys.stderr, flush=True)
            continue
        tables = with_answer(tables, name, answer, seconds)
        write(tables, args.out)
    print(write(tables, args.out))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; what they said is above")


if __name__ == "__main__":
    main()
