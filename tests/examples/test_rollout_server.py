"""The example of a server: its shell files are what bash reads, and their flags those of ``taopd train``."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_taopd.cli import parse
from megatron_taopd.config import TrainConfig

DIRECTORY = Path(__file__).resolve().parents[2] / "examples/rollout_server"


def words_of(script: str, *more: str, **variables: str) -> list[str]:
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "STUDENT": "/models/a student", **variables}
    done = subprocess.run(
        ["bash", str(DIRECTORY / script), *more], env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", ["serve.sh", "train.sh", "on_cpu.sh"])
def test_bash_reads_the_files(script: str) -> None:
    subprocess.run(["bash", "-n", str(DIRECTORY / script)], check=True)


def test_the_flags_are_those_of_train() -> None:
    words = words_of(
        "train.sh",
        "--max-staleness=7",
        API="vllm",
        URL="http://a:1 http://b:2/v1",
        TEACHER="/t",
        PROMPT_DATA="p.jsonl",
        OUTPUT="out",
        EVERY="3",
        ROLLOUT_KEY="s3cret",
    )
    assert words[:5] == ["torchrun", "--nproc-per-node", "8", "-m", "megatron_taopd"] and "s3cret" not in words
    config: TrainConfig = parse(TrainConfig, words[6:], name="train")
    assert config.models.student == "/models/a student"
    assert config.rollout_server.rollout_url == ["http://a:1", "http://b:2"]
    assert config.rollout_server.rollout_api_key_env == "ROLLOUT_KEY"
    assert (config.rollout_server.rollout_weights_every, config.rollout_server.staleness_bound) == (3, 7)


@pytest.mark.parametrize(("api", "first", "port"), [("vllm", "vllm", "8000"), ("sglang", "python3", "30000")])
def test_servers_listen_on_this_machine_alone_unless_told(api: str, first: str, port: str) -> None:
    words = words_of("serve.sh", "--seed", "5", API=api, ROLLOUT_KEY="s3cret")
    assert words[0] == first and "/models/a student" in words and "s3cret" not in words
    assert words[words.index("--host") + 1] == "127.0.0.1" and words[words.index("--port") + 1] == port
    assert words[-2:] == ["--seed", "5"]
