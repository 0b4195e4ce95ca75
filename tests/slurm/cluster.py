"""A real Slurm cluster of two nodes on the loopback address, with its own munge, ports and folders."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

NODES = ("n1", "n2")
DAEMONS = ("munged", "slurmctld", "slurmd")
DEBIAN_FOLDERS = os.pathsep.join(["/usr/sbin", "/sbin"])  # where daemons are, and often not in a user's PATH

# `low` gives way to `high`: its jobs are told by SIGTERM, have GraceTime to save, and are requeued.
SLURM_CONF = """
ClusterName=llmtrain
SlurmctldHost={hostname}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=20 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    path = os.environ.get("PATH", "") + os.pathsep + DEBIAN_FOLDERS
    absent = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name, path=path)]
    if absent:
        return f"no {', '.join(absent)} on this machine; Debian: apt-get install slurm-wlm munge (.ci/run does)"
    if os.geteuid() != 0:
        return "starting a Slurm cluster takes root: slurmd starts jobs as their users"
    return None


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def wait_until(condition: Callable[[], Any], timeout_s: float, what: Callable[[], str] | str) -> Any:
    """Poll until the condition gives something true, and return that; else fail and say what was waited for."""
    end = time.monotonic() + timeout_s
    while True:
        if found := condition():
            return found
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout_s} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.1)


@dataclass(frozen=True)
class Job:
    """What the controller says of a job now."""

    id: str
    fields: Mapping[str, str]

    @property
    def state(self) -> str:
        """RUNNING, COMPLETED, FAILED, …"""
        return self.fields["JobState"]

    @property
    def restarts(self) -> int:
        """How often it was requeued and started again."""
        return int(self.fields["Restarts"])

    @property
    def exit_code(self) -> int:
        """Of the batch script."""
        return int(self.fields["ExitCode"].partition(":")[0])


class Cluster:
    """One munged, one slurmctld, and a slurmd for each node; all of them end with it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: list[tuple[str, subprocess.Popen[bytes]]] = []
        controller, *nodes = free_ports(1 + len(NODES))
        hostname = socket.gethostname().partition(".")[0]
        lines = [
            f"NodeName={name} NodeHostname={hostname} NodeAddr=127.0.0.1 Port={port} CPUs=4 Gres=gpu:2 State=UNKNOWN"
            for name, port in zip(NODES, nodes, strict=True)
        ]
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir(mode=0o700)
        text = SLURM_CONF.format(hostname=hostname, controller_port=controller, folder=folder, nodes="\n".join(lines))
        (folder / "slurm.conf").write_text(text.lstrip())
        # Files stand in for GPUs, which nothing here opens: jobs ask for them as they would on a real cluster.
        gpus = [folder / f"gpu{i}" for i in range(2)]
        for gpu in gpus:
            gpu.touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.environ["PATH"] + os.pathsep + DEBIAN_FOLDERS,
        }

    def __enter__(self) -> Self:
        try:
            self._start_munge()
            self._start("slurmctld", "-D", "-i")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            states = ("sinfo", "--noheader", "--Node", "--partition=normal", "--format=%T")
            wait_until(lambda: self.run(*states).split() == ["idle"] * len(NODES), 30, self.logs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_munge(self) -> None:
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        places = {name: self.folder / "munge" / name for name in ("socket", "pid", "seed", "log")}
        self._start(
            "munged", "--force", "--foreground", f"--key-file={key}", f"--socket={places['socket']}",
            f"--pid-file={places['pid']}", f"--seed-file={places['seed']}", f"--log-file={places['log']}",
        )  # fmt: skip
        wait_until(places["socket"].exists, 10, lambda: f"munged's socket; {self.logs()}")

    def _start(self, name: str, *arguments: str) -> None:
        log = self.folder / f"{'-'.join([name, *arguments[2:3]]) if name == 'slurmd' else name}.log"
        with log.open("wb") as file:
            # If this process is killed, nobody is left to end them.
            command = ["setpriv", "--pdeathsig", "TERM", name, *arguments]
            daemon = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        self._daemons.append((name, daemon))

    def __exit__(self, *_: object) -> None:
        if any(name == "slurmd" for name, _ in self._daemons):
            # Jobs that a failed test left; their processes must end while there is somebody to end them.
            self.run("scancel", "--user=root")
            wait_until(lambda: not self.run("squeue", "--noheader"), 60, self.logs)
        for _, daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for name, daemon in reversed(self._daemons):
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
                raise AssertionError(f"{name} did not end by itself") from None

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Run a Slurm command as a user would; return what it prints."""
        done = subprocess.run(
            command, env={**self.environment, **environment}, cwd=cwd, timeout=60, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """`sbatch arguments` in that folder; return the job's number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, **environment).strip()

    def job(self, job_id: str) -> Job:
        """What the controller knows of it."""
        words = self.run("scontrol", "--oneliner", "show", "job", job_id).split()
        return Job(job_id, dict(word.split("=", 1) for word in words if "=" in word))

    def is_idle(self) -> bool:
        """Whether every node has ended what it was given, and has reported so."""
        return set(self.run("sinfo", "--noheader", "--Node", "--format=%T").split()) == {"idle"}

    def wait(self, job_id: str, *states: str, timeout_s: float = 120) -> Job:
        """Wait until the job is in one of the states (default: any in which it is over)."""
        over = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
        wait_until(lambda: self.job(job_id).state in over, timeout_s, lambda: f"{over}, is {self.job(job_id)}")
        return self.job(job_id)

    def ranks(self, job_id: str) -> dict[int, int]:
        """The processes of a training job that runs now: rank → pid, found by what Slurm and torchrun gave them."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
                program = (folder / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended
            values = dict(variable.split(b"=", 1) for variable in variables if b"=" in variable)
            is_ours = values.get(b"SLURM_CONF") == self.environment["SLURM_CONF"].encode()
            is_rank = b"RANK" in values and b"\0-m\0llmtrain.train\0" in program
            if is_ours and is_rank and values.get(b"SLURM_JOB_ID") == job_id.encode():
                found[int(values[b"RANK"])] = int(folder.name)
        return found

    def logs(self) -> str:
        """The last lines of each daemon, for a failing test's message."""
        logs = self.folder.glob("*.log")
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)
