"""Where the teacher's mass lies: C on the students' top-K for several K, on responses of the untrained student 1.

Prints the table of docs/reproduction.md from the prepared models of both regimes (prepare.py), and leaves the responses
and banks, from which anything else about these positions can be had, in OUT/REGIME/set_up.

    python examples/reproduce_small/contexts.py --out build/reproduce_small
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from prepare import REGIMES, Sizes, make

from megatron_taopd.cli import run
from megatron_taopd.diagnostics.bank import Bank, open_bank

SUPPORT_K = (2, 4, 16)
LOW_C = 0.5
WORST = 0.1
"""Share of the positions that count as those with the largest divergence."""


def bank_of(out: Path, regime: str, *, num_prompts: int, response_length: int) -> Bank:
    """Responses of student 1 to the first held-out prompts, scored with each K; made unless they are there."""
    home = out / regime / "set_up"
    student = ["--student", str(out / regime / "student-1")]
    prompts, rollouts = home / "prompts.jsonl", home / "rollouts.jsonl"
    lines = (out / "heldout_prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:num_prompts]
    make(prompts, lambda path: path.write_text("".join(lines), encoding="utf-8"))
    answer = ["rollout", *student, "--prompt-data", str(prompts), "--max-response-length", str(response_length)]
    make(rollouts, lambda path: run([*answer, "--seed", "1", "--output", str(path)]))
    score = ["diagnose", "bank", *student, "--teacher", str(out / "teacher"), "--rollout-data", str(rollouts)]
    score += [word for k in SUPPORT_K for word in ("--support-k", str(k))]
    make(home / "bank", lambda path: run([*score, "--micro-batch-size", "4", "--output", str(path)]))
    return open_bank(home / "bank")


def figures(bank: Bank, k: int) -> tuple[float, float, float]:
    """The 5 % quantile of C, the share of positions with C < 0.5, and that share of the tenth with the largest KL_f."""
    c, divergence = bank.positions[f"C_k{k}"], bank.positions["kl_forward"]
    worst = np.argsort(-divergence, kind="stable")[: round(WORST * len(c))]
    return float(np.quantile(c, 0.05)), float(np.mean(c < LOW_C)), float(np.mean(c[worst] < LOW_C))


def contexts(out: Path, regimes: Sequence[str], *, num_prompts: int, response_length: int) -> str:
    """The table, as Markdown."""
    banks = {
        regime: bank_of(out, regime, num_prompts=num_prompts, response_length=response_length) for regime in regimes
    }
    columns = [
        title
        for r in regimes
        for title in (f"q05 of C, `{r}`", f"C < 0.5, `{r}`", "of the tenth with the largest KL_f")
    ]
    lines = [["K", *columns], ["---"] * (1 + len(columns))]
    for k in SUPPORT_K:
        line = [str(k)]
        for bank in banks.values():
            quantile, low, low_of_worst = figures(bank, k)
            line += [f"{quantile:.3g}", f"{100 * low:.1f} %", f"{100 * low_of_worst:.0f} %"]
        lines.append(line)
    sizes = ", ".join(
        f"`{regime}` {len(bank.positions['kl_forward'])} positions, mean KL_f {bank.positions['kl_forward'].mean():.3f}"
        for regime, bank in banks.items()
    )
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", sizes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/reproduce_small"), help="where prepare.py wrote")
    parser.add_argument("--num-prompts", type=int, default=40)
    args = parser.parse_args()
    length = Sizes().response_length
    print(contexts(args.out, list(REGIMES), num_prompts=args.num_prompts, response_length=length))


if __name__ == "__main__":
    main()
