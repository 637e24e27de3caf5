"""Whether a completed function passes its tests, in a process of its own with limits on time and memory.

The limits stop accidents, not attacks: the code may do whatever you may do on this machine.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from typing import Any

SECONDS = 10
MEMORY = 2 * 2**30  # bytes


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The metric of one problem.

    Args:
        doc: a line of HumanEval: ``prompt``, ``test``, ``entry_point``.
        results: what the model wrote after the prompt.
    """
    program = f"{doc['prompt']}{results[0]}\n\n{doc['test']}\n\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(passes(program))}


def passes(program: str) -> bool:
    """Whether a Python program ends without an error within the limits."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program + "\nprint('passed all tests')"],
                cwd=directory,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS,
                preexec_fn=_limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    # A program that leaves early has not passed its tests.
    return done.returncode == 0 and done.stdout.endswith(b"passed all tests\n")


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
