"""Two torchrun nodes that have nothing but a network in common take the demo's steps as one node does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.launch import runs
from tests.launch.namespaces import ADDRESSES, two_nodes


@pytest.mark.slow
def test_two_nodes_give_the_weights_of_one(pool, tmp_path: Path) -> None:
    """The quickstart's recipe has two pipeline stages: hidden states and their gradients cross the network."""
    runs.make_files(tmp_path)
    outs = {name: tmp_path / name for name in ("one", "two")}
    commands = {
        name: [
            *("train", "--config", str(ROOT / "examples/quickstart/train.yaml")),
            *("--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")),
            *("--prompt-data", str(tmp_path / "prompts.jsonl"), "--max-response-length", "6", "--train-iters", "2"),
            *("--log-dir", str(out), "--export-hf", str(out / "hf")),
        ]
        for name, out in outs.items()
    }
    with two_nodes() as nodes:
        started = []
        for rank, node in enumerate(nodes):
            own = [
                *("--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1", "--master-addr", ADDRESSES[0]),
                *("--local-addr", ADDRESSES[rank], "--env", "GLOO_SOCKET_IFNAME=eth0"),
            ]
            python = [*node, sys.executable, "-m", "megatron_taopd", "launch", "local"]
            started.append(
                subprocess.Popen(
                    [*python, *own, "--", *commands["two"]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            )
        try:
            pool(2).run(runs.run, commands["one"])
            said = [process.communicate(timeout=300)[0].decode() for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    assert "--local-addr 10.97.13.2" in said[1] and "is_host=0" in said[1]
    assert sum("iteration        2/       2" in text for text in said) == 1  # rank 0 is on one of them
    assert [row["loss"] for row in runs.metrics(outs["two"])] == [row["loss"] for row in runs.metrics(outs["one"])]
    runs.assert_same_weights(outs["one"], outs["two"])
