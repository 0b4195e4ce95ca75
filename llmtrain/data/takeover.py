"""What a Slurm job has left unfinished on another host, and whether it is gone on with on this one.

A lock that a process held may reach its own host only, so what lies there of another host could be of a process that
lives. Slurm knows: it starts a job again, on whatever host, once that has ended or its node is lost, and `squeue` tells
whether another has ended. (A lost node may live on without its network, so whoever goes on with files that were open
gives them new inodes first: `data/journal.py`.)
"""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

_JOB = "slurm-job.json"
_QUEUE_S = 30.0  # for a controller that is slow
_FILTERS = ("SQUEUE_", "SLURM_CLUSTERS")  # by which a user hides jobs from himself
_FORGOTTEN = "Invalid job id"  # of a job that has ended long ago
# squeue(1), job state codes: where no process is left, nor will be.
_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip


@dataclass(frozen=True)
class SlurmJob:
    """A job, and how often it had been requeued; ValueError: no such thing."""

    cluster: str
    id: str
    restarts: int

    def __post_init__(self) -> None:
        if not (isinstance(self.id, str) and self.id.isdecimal() and isinstance(self.restarts, int)):
            raise ValueError(f"job {self.id!r}, restarted {self.restarts!r} times")

    @classmethod
    def current(cls) -> Self | None:
        """The one that this process is in, and ends with.

        In a shell on a login node that was given nodes there is an id, too, but Slurm ends nothing there.
        """
        of = os.environ
        if "SLURMD_NODENAME" in of:
            with suppress(KeyError, ValueError):
                restarts = int(of.get("SLURM_RESTART_COUNT", "0"))
                return cls(of.get("SLURM_CLUSTER_NAME", ""), of["SLURM_JOB_ID"], restarts)
        return None

    @classmethod
    def of(cls, partial: Path) -> Self | None:
        """The one that last was at an unfinished folder, if it is of this user: Slurm may hide jobs of others."""
        with suppress(OSError, ValueError, TypeError):
            if partial.stat().st_uid == os.geteuid():
                return cls(**json.loads((partial / _JOB).read_bytes()))
        return None

    def why_alive(self, now: SlurmJob | None) -> str | None:
        """Why it may be running, seen from the job `now`; None: it has ended."""
        if now is None or self.cluster != now.cluster:
            return f"Slurm job {self.id} on '{self.cluster}' cannot be asked about from here"
        if self.id == now.id:
            return None if self.restarts < now.restarts else f"it is of this very job, {self.id}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_FILTERS)}
        command = ["squeue", "--noheader", "--states=all", "--format=%A %T", f"--jobs={self.id}"]
        try:
            asked = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_QUEUE_S, env=environment
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"nobody says whether Slurm job {self.id} has ended ({error})"
        if asked.returncode:
            *_, last = asked.stderr.strip().splitlines() or [f"squeue ended with {asked.returncode}"]
            return None if _FORGOTTEN in asked.stderr else f"nobody says whether Slurm job {self.id} has ended ({last})"
        # Of an array the id of one task is that of the array: all tasks are listed, but for what is forgotten.
        listed = [line.strip().partition(" ") for line in asked.stdout.splitlines()]
        states = [state.strip() for job, _, state in listed if job == self.id]
        if listed and set(states) <= _ENDED:
            return None
        return f"Slurm job {self.id} is {' and '.join(states) or 'not listed'}"


def sign(partial: Path, job: SlurmJob | None) -> None:
    """Say in an unfinished folder which job is at it; None: a process of none, which nobody can ask about."""
    if job:
        signed = partial / f"{_JOB}.{os.getpid()}"
        signed.write_text(json.dumps(asdict(job)))
        signed.replace(partial / _JOB)
    else:
        (partial / _JOB).unlink(missing_ok=True)
