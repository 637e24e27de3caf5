"""A SLURM of one machine for the tests: munged, slurmctld and slurmd with ports, keys and directories of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONFIG = """\
ClusterName=taopd-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
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
KillWait=30
MessageTimeout=30
InactiveLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=patient Nodes={host} MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


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
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "PATH": _path(),
            "SLURM_CONF": str(root / "slurm.conf"),
        }
        self._pid_files = [root / f"{name}.pid" for name in ("slurmd", "slurmctld", "munged")]

    def start(self) -> None:
        """Start the daemons and wait until the node is idle."""
        for name in ("state", "spool"):
            (self.root / name).mkdir(parents=True)
        controller_port, node_port = _free_ports(2)
        text = CONFIG.format(
            host=self.host,
            root=self.root,
            controller_port=controller_port,
            node_port=node_port,
            cpus=os.cpu_count(),
        )
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
        self.run("slurmd", "-c", "-N", self.host)
        self.wait(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%t"), "an idle node", timeout=60)

    def stop(self) -> None:
        """End jobs and daemons, by the ids that they wrote."""
        subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, timeout=30)
        pids = [int(file.read_text()) for file in self._pid_files if file.exists() and file.read_text().strip()]
        for pid in pids:
            _send(pid, signal.SIGTERM)
        deadline = time.monotonic() + 10
        while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in pids:
            _send(pid, signal.SIGKILL)

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

    def wait(self, happened: Callable[[], object], what: str, *, timeout: float) -> None:
        """Look ten times a second until it has happened."""
        deadline = time.monotonic() + timeout
        while not happened():
            assert time.monotonic() < deadline, f"no {what} in {timeout} s; daemons' logs are in {self.root}"
            time.sleep(0.1)


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
