"""A tiny run, whose tokenizer has words that would be markup or scripts if a page did not escape them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from megatron_taopd import cli
from tests.data.tokenizers_for_tests import SPECIAL, save_word_tokenizer
from tests.oracle.cases import STUDENT_VOCAB, make_pair, make_rollouts

HOSTILE = (
    "<script>document.body.dataset.hacked=1</script>",
    '"><img/src=x/onerror="document.body.dataset.hacked=1">',
    "</p></article></section></main><h1>gone</h1>",
    "\u202eright-to-left",
    "two\nlines\n",
    "{{7*7}}{%print(8*8)%}",
    "]]></script><style>*{display:none}</style>",
    "&lt;entity&amp;",
    "\x00\x1b[31m",
)
DIRECTORY = "log<b>&'dir'"


def make_run(root: Path) -> Path:
    """Train three steps with a dump each, and score; runs in every rank. Returns the run's directory."""
    run = root / DIRECTORY
    if (run / "metrics.jsonl").exists():
        return run
    make_pair(root, "qwen3", tied_student=True)
    words = [*HOSTILE, *(f"w{i}" for i in range(STUDENT_VOCAB - len(SPECIAL) - len(HOSTILE)))]
    for model in ("student", "teacher"):
        save_word_tokenizer(root / model, words)
    rows = make_rollouts(root / "rollouts.jsonl", count=12, seed=3)
    for index, row in enumerate(rows):  # each hostile word is a prompt's and a response's
        word = len(SPECIAL) + index % len(HOSTILE)
        row["response_tokens"][0] = word
        row["prompt_tokens"] = [word, 100]
        row["id"] = f"r{index}<i>"
    (root / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = [f"--student={root / 'student'}", f"--teacher={root / 'teacher'}"]
    cli.run(
        [
            *("train", *pair, "--rollout-engine=file", f"--rollout-data={root / 'rollouts.jsonl'}"),
            *("--global-batch-size=4", "--micro-batch-size=4", "--train-iters=3", "--keep-ratio=0.2", "--lr=1e-3"),
            *("--support-k=8", "--dump-kept-interval=1", "--monitor-interval=1", f"--log-dir={run}"),
        ]
    )
    out = root / "before.parquet"
    scored = ["--micro-batch-size=4", "--keep-ratio=0.2", "--support-k=8", f"--output={out}"]
    cli.run(["score", *pair, f"--rollout-data={root / 'rollouts.jsonl'}", *scored])
    rows = pq.read_table(out).to_pylist()
    for row in rows:  # as if training had halved the gap everywhere
        row["kl_forward"] /= 2
    (root / "after.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run
