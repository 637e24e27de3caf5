"""Two "nodes" on this machine: network namespaces with a cable between them and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.needs import missing

ADDRESSES = ("10.97.13.1", "10.97.13.2")


def _ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)


@contextmanager
def two_nodes() -> Iterator[list[list[str]]]:
    """For each node the words that start a command on it; their addresses are :data:`ADDRESSES`, both on eth0."""
    if shutil.which("ip") is None:
        missing("no ip (iproute2)")
    names = [f"taopd{os.getpid()}{side}" for side in "ab"]
    made: list[str] = []
    try:
        for name in names:
            if (answer := _ip("netns", "add", name)).returncode:
                missing(f"network namespaces are not permitted here: {answer.stderr.strip()}")
            made.append(name)
        ends = ("type", "veth", "peer", "name", "eth0", "netns", names[1])
        commands = [("link", "add", "eth0", "netns", names[0], *ends)]
        for name, address in zip(names, ADDRESSES, strict=True):
            commands += [
                ("-n", name, "addr", "add", f"{address}/24", "dev", "eth0"),
                ("-n", name, "link", "set", "eth0", "up"),
                ("-n", name, "link", "set", "lo", "up"),
            ]
        for words in commands:
            if (answer := _ip(*words)).returncode:
                missing(f"ip {' '.join(words)}: {answer.stderr.strip()}")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in made:
            _ip("netns", "del", name)
