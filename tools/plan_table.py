"""The table "To 1,024 GPUs" of docs/plan.md, each row from ``taopd plan``.

    python tools/plan_table.py [--write]

Prints the table; with --write puts it into the page.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

from megatron_taopd import cli

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "plan.md"
FLAGS = ("--global-batch-size=1024", "--propose", "--bf16", "--use-distributed-optimizer")
ROWS = [
    *(("qwen3_4b", "qwen3_32b", gpus) for gpus in (8, 64, 256)),
    *(("qwen3_8b", "qwen3_235b_a22b", gpus) for gpus in (16, 32, 128, 512)),
    *(("qwen3_32b", "qwen3_235b_a22b", gpus) for gpus in (32, 64, 256, 1024)),
]
HEADER = (
    "| student | teacher | GPUs | layouts that fit | quickest layout | GiB of a GPU | rollout s | score s | train s "
    "| step s at least |\n|---|---|--:|--:|---|--:|--:|--:|--:|--:|\n"
)


def row(student: str, teacher: str, num_gpus: int) -> str:
    """What the command prints of its first proposal."""
    configs, printed = ROOT / "examples" / "models" / "configs", io.StringIO()
    words = [f"--student={configs / student}", f"--teacher={configs / teacher}", f"--num-gpus={num_gpus}", *FLAGS]
    with contextlib.redirect_stdout(printed):
        status = cli.run(["plan", *words])
    lines = printed.getvalue().splitlines()
    if status != 0:
        raise SystemExit(f"{student}, {teacher}, {num_gpus} GPUs: {lines[-1]}")
    return f"| {student} | {teacher} | {num_gpus} | {lines[0].partition(' layouts fit')[0]} {lines[4]}\n"


def main() -> None:
    """Print the table, or put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    write = parser.parse_args().write
    table = HEADER + "".join(row(*case) for case in ROWS)
    if not write:
        print(table, end="")
        return
    text = PAGE.read_text(encoding="utf-8")
    start = text.index(HEADER)
    PAGE.write_text(text[:start] + table + text[text.index("\n\n", start) + 1 :], encoding="utf-8")


if __name__ == "__main__":
    main()
