"""The quickstart: distil SmolLM2-135M-Instruct into itself with two layers cut out, on two CPU ranks.

1. prepare   teacher and student as HF directories, prompts from reasoning-gym (prepare.py)
2. before    the student answers held-out prompts; both models score these answers
3. train     TA-OPD: 10 % of the student's own tokens carry the loss
4. after     the trained student is scored on the *same* answers, so that contexts do not change with the model
5. report    full-vocabulary KL before and after, an answer before and after, a plot, and a page about the run

Every step is a command that is printed before it runs; run it from the root of the repository:
    python examples/quickstart/demo.py --work-dir build/quickstart
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RANKS = 2
LAYOUT = ["--pipeline-model-parallel-size", str(RANKS)]


def show_and_run(title: str, command: list[str]) -> None:
    """Print a command, run it, say how long it took; a failure ends the demo."""
    print(f"\n=== {title}\n$ {shlex.join(command)}", flush=True)
    started = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(f"=== done in {time.perf_counter() - started:.0f} s", flush=True)


def taopd(*words: str | Path) -> list[str]:
    """A ``taopd`` command on two ranks of this machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--standalone"]
    return [*torchrun, "-m", "megatron_taopd", *map(str, words)]


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mean_column(path: Path, column: str) -> float:
    """Mean of a column of a score table, over response positions."""
    import pyarrow.parquet as pq

    values = pq.read_table(path, columns=[column])[column].to_pylist()
    return sum(values) / len(values)


def plot(metrics: list[dict], before: float, after: float, path: Path) -> None:
    """Training curves on the left, held-out KL before and after on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), gridspec_kw={"width_ratios": [2, 1]})
    steps = [m["iteration"] for m in metrics]
    left.plot(steps, [m["kl_forward"] for m in metrics], label="all response tokens")
    left.plot(steps, [m["kept_kl_forward"] for m in metrics], label="kept tokens (10 %)")
    left.set(xlabel="iteration", ylabel="KL(teacher ‖ student), nats a token", title="on the step's own responses")
    left.set_ylim(bottom=0)
    left.legend()
    bars = right.bar(["before", "after"], [before, after], color=["tab:gray", "tab:green"])
    right.bar_label(bars, fmt="%.3f")
    right.margins(y=0.12)
    right.set(title="held-out, same contexts", ylabel="KL(teacher ‖ student), nats a token")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("build/quickstart"), help="everything is written here")
    parser.add_argument("--train-iters", type=int, help="training steps (default: those of train.yaml)")
    args = parser.parse_args()
    work: Path = args.work_dir
    started = time.perf_counter()

    show_and_run("1/5 prepare: models and prompts", [sys.executable, str(HERE / "prepare.py"), "--out", str(work)])
    teacher, student = work / "teacher", work / "student"
    run = work / "run"
    trained = run / "hf"

    answers = work / "heldout_rollouts.jsonl"
    pair = ["--teacher", teacher, "--rollout-data", answers, "--micro-batch-size", "4", *LAYOUT]
    generate = ["--prompt-data", work / "heldout_prompts.jsonl", "--max-response-length", "48", *LAYOUT]
    show_and_run(
        "2/5 before: the student answers held-out prompts ...",
        taopd("rollout", "--student", student, "--output", answers, *generate),
    )
    show_and_run(
        "    ... and both models score every position of these answers",
        taopd("score", "--student", student, "--output", work / "before.parquet", *pair),
    )
    iters = [] if args.train_iters is None else ["--train-iters", str(args.train_iters)]
    show_and_run(
        "3/5 train: teachability-aware on-policy distillation",
        taopd(
            *["train", "--config", HERE / "train.yaml", "--student", student, "--teacher", teacher],
            *[
                "--prompt-data",
                work / "train_prompts.jsonl",
                "--log-dir",
                run,
                "--tensorboard-dir",
                run / "tb",
            ],
            *["--save", run / "checkpoints", "--export-hf", trained, *iters],
        ),
    )
    show_and_run(
        "4/5 after: the trained student on the same answers",
        taopd("score", "--student", trained, "--output", work / "after.parquet", *pair),
    )
    samples = run / "heldout_rollouts.jsonl"
    show_and_run(
        "5/5 the trained student answers the held-out prompts with the same seed",
        taopd("rollout", "--student", trained, "--output", samples, *generate),
    )

    before, after = (mean_column(work / f"{name}.parquet", "kl_forward") for name in ("before", "after"))
    metrics = read_jsonl(run / "metrics.jsonl")
    plot(metrics, before, after, run / "plot.png")
    tables = [word for name in ("before", "after") for word in ("--score-table", str(work / f"{name}.parquet"))]
    texts = ["--rollout-data", str(answers), "--tokenizer", str(student)]
    show_and_run(
        "    a page about the run",
        [sys.executable, "-m", "megatron_taopd", "report", "--log-dir", str(run), *tables, *texts],
    )
    old, new = read_jsonl(answers)[0], read_jsonl(samples)[0]
    change = (after - before) / before
    kept = sum(m["num_kept_tokens"] for m in metrics)
    valid = sum(m["num_valid_tokens"] for m in metrics)
    print(
        f"""
================================ quickstart: result ================================
KL(teacher || student), full vocabulary, held-out contexts, nats a token
    before  {before:.4f}
    after   {after:.4f}     ({change:+.1%}, {len(metrics)} steps, {kept:.0f} of {valid:.0f} tokens kept)

prompt          {old["messages"][-1]["content"]!r}
before          {old["response"]!r}
after           {new["response"]!r}

HF model        {trained}
checkpoints     {run / "checkpoints"}
metrics         {run / "metrics.jsonl"}  (TensorBoard: {run / "tb"})
plot            {run / "plot.png"}
page            {run / "report.html"}  (self-contained: curves, the kept tokens in colour)
whole demo      {time.perf_counter() - started:.0f} s
===================================================================================="""
    )
    if not after < before:
        sys.exit("the held-out KL did not fall: this run did not learn")


if __name__ == "__main__":
    main()
