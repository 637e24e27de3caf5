"""A SLURM of two nodes on one machine for the tests: munged, slurmctld and a slurmd a node, with ports, keys and
directories of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONFIG = """\
ClusterName=taopd-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
MessageTimeout=30
InactiveLimit=0
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=patient Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
# Names that every machine finds without asking: the ranks reach each other by them.
NODE = "NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=100 State=UNKNOWN"


def missing_programs() -> list[str]:
    """What this cluster needs and is not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


class Cluster:
    """Started daemons; `run` calls SLURM's commands on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.host = socket.gethostname().split(".")[0]
        self.nodes = ["127.0.0.2", "127.0.0.3"]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "PATH": _path(),
            "SLURM_CONF": str(root / "slurm.conf"),
        }
        daemons = [*(f"slurmd-{node}" for node in self.nodes), "slurmctld", "munged"]
        self._pid_files = [root / f"{name}.pid" for name in daemons]

    def start(self) -> None:
        """Start the daemons and wait until the nodes are idle."""
        (self.root / "state").mkdir(parents=True)
        controller_port, *ports = _free_ports(1 + len(self.nodes))
        nodes = [NODE.format(name=name, port=port) for name, port in zip(self.nodes, ports, strict=True)]
        text = CONFIG.format(host=self.host, root=self.root, controller_port=controller_port, nodes="\n".join(nodes))
        (self.root / "slurm.conf").write_text(text)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self.run(
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={self.root / 'munge.socket'}",
            f"--log-file={self.root / 'munged.log'}",
            f"--pid-file={self.root / 'munged.pid'}",
            f"--seed-file={self.root / 'munge.seed'}",
        )
        self.run("slurmctld", "-c")
        for node in self.nodes:
            self.run("slurmd", "-c", "-N", node)
        self.wait(self.is_idle, "idle nodes", timeout=60)

    def stop(self) -> None:
        """End jobs and daemons, by the ids that they wrote."""
        if (self.root / "slurmctld.pid").exists():
            subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, timeout=30)
        pids = [int(file.read_text()) for file in self._pid_files if file.exists() and file.read_text().strip()]
        for pid in pids:
            _send(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in pids:
            _send(pid, signal.SIGKILL)

    def is_idle(self) -> bool:
        """Whether all nodes wait for jobs."""
        states = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%t").split()
        return states == ["idle"] * len(self.nodes)

    def run(self, *words: str | Path, **changes: str) -> str:
        """Standard output of a command; an error shows all that it said."""
        answer = subprocess.run(
            [str(word) for word in words],
            env={**self.environment, **changes},
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        assert answer.returncode == 0, f"{words}: {answer.returncode}\n{answer.stdout}\n{answer.stderr}"
        return answer.stdout

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows of a job."""
        text = self.run("scontrol", "show", "job", "--oneliner", job)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, happened: Callable[[], object], what: str | Callable[[], str], *, timeout: float) -> None:
        """Look ten times a second until it has happened."""
        deadline = time.monotonic() + timeout
        while not happened():
            if time.monotonic() > deadline:
                missed = what if isinstance(what, str) else what()
                raise AssertionError(f"not in {timeout:g} s: {missed}; the daemons' logs are in {self.root}")
            time.sleep(0.1)


@dataclass
class Job:
    """A submitted job and where it writes."""

    cluster: Cluster
    id: str
    directory: Path

    def log(self) -> str:
        """What the batch script said."""
        path = self.directory / f"{self.id}.log"
        return path.read_text() if path.exists() else ""

    def ranks(self, attempt: int) -> str:
        """What the ranks said."""
        path = self.directory / f"{self.id}.attempt-{attempt}.log"
        return path.read_text() if path.exists() else ""

    def state(self, name: str = "JobState") -> str:
        return self.cluster.state(self.id)[name]

    def wait_for_ranks(self, attempt: int = 0, nodes: int = 2) -> None:
        started = f"start {attempt} of node"
        self.cluster.wait(lambda: self.ranks(attempt).count(started) == nodes, self.log, timeout=60)

    def wait_for_state(self, *states: str, timeout: float = 60) -> None:
        self.cluster.wait(
            lambda: self.state() in states, lambda: f"{states}, is {self.state()}: {self.log()}", timeout=timeout
        )

    def start_again_now(self, restarts: int = 1) -> None:
        """Run a job that was queued again, for so many times now; left alone, SLURM lets it wait for two minutes."""
        queued = {"Restarts": str(restarts), "JobState": "PENDING", "Reason": "BeginTime"}
        self.cluster.wait(lambda: queued.items() <= self.cluster.state(self.id).items(), self.log, timeout=60)
        time.sleep(2.1)  # credentials are told apart by the second, and those of the first attempt are void
        self.cluster.run("scontrol", "update", f"jobid={self.id}", "starttime=now")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
