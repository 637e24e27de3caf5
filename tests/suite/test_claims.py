"""Who has a run: living processes keep it, dead ones lose it to exactly one other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_taopd.suite import claims


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_living_process_keeps_its_run(tmp_path: Path) -> None:
    claim = claims.take(tmp_path)
    assert claim is not None and claim.is_ours()
    assert claims.is_claimed(tmp_path) and claims.take(tmp_path) is None
    claim.release()
    assert not claims.is_claimed(tmp_path) and names(tmp_path) == []


def dead_process(tmp_path: Path) -> None:
    """A claim of a process that was killed."""
    code = (
        f"import os, sys; from megatron_taopd.suite import claims as c; c.take(c.Path({str(tmp_path)!r})); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert names(tmp_path) == ["claim.1"]


def test_a_killed_process_of_this_machine_loses_it_at_once_to_one_other(tmp_path: Path) -> None:
    dead_process(tmp_path)
    taken: list[claims.Claim] = []
    ready = threading.Barrier(8)

    def race() -> None:
        ready.wait()
        claim = claims.take(tmp_path)
        if claim is not None:
            taken.append(claim)

    racers = [threading.Thread(target=race) for _ in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(taken) == 1 and taken[0].path.name == "claim.2"
    taken[0].release()
    assert names(tmp_path) == []


def elsewhere(directory: Path, *, age: float) -> Path:
    """A claim of another machine, with a heartbeat of that age."""
    path = directory / "claim.1"
    path.write_text(json.dumps({"token": "x", "pid": os.getpid(), "created": 0.0, "place": "another machine"}))
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.mark.parametrize("age, free", [(0.0, False), (claims.DEAD_AFTER_SECONDS + 30, True)])
def test_another_machine_is_judged_by_its_heartbeat(tmp_path: Path, age: float, free: bool) -> None:
    elsewhere(tmp_path, age=age)
    claim = claims.take(tmp_path)
    assert (claim is not None) == free
    if claim is not None:
        claim.release()


def test_a_heartbeat_keeps_the_claim_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.05)
    claim = claims.take(tmp_path)
    assert claim is not None
    os.utime(claim.path, (1.0, 1.0))
    deadline = time.monotonic() + 20
    while claim.path.stat().st_mtime == 1.0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert claim.path.stat().st_mtime > 1.0
    claim.release()


def test_who_slept_too_long_knows_that_the_run_is_no_longer_its_own(tmp_path: Path) -> None:
    sleeper = claims.take(tmp_path)
    assert sleeper is not None
    (tmp_path / "claim.2").write_text(json.dumps({"token": "y", "pid": os.getpid(), "created": 0.0, "place": "z"}))
    assert not sleeper.is_ours()
    sleeper.release()
    assert names(tmp_path) == ["claim.1", "claim.2"]
