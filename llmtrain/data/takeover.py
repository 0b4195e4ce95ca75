"""What a Slurm job has left unfinished on another host, and whether it is gone on with on this one.

A lock that a process held may reach its own host only, so what lies there of another host could be of a process that
lives. Slurm knows: it starts a job again, on whatever host, once that has ended or its node is lost, and what is not
in its queue has ended. (A lost node may live on without its network, so whoever goes on with files that were open
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
        """The one that this process is in."""
        of = os.environ
        with suppress(KeyError, ValueError):  # as it is outside of Slurm
            return cls(of.get("SLURM_CLUSTER_NAME", ""), of["SLURM_JOB_ID"], int(of.get("SLURM_RESTART_COUNT", "0")))
        return None

    @classmethod
    def of(cls, partial: Path) -> Self | None:
        """The one that last was at an unfinished folder, if it is of this user: Slurm may hide jobs of others."""
        with suppress(OSError, ValueError, TypeError):
            if partial.stat().st_uid == os.geteuid():
                return cls(**json.loads((partial / _JOB).read_bytes()))
        return None

    def has_ended(self, now: SlurmJob) -> bool:
        """Whether it cannot be running; `now` is the job that asks."""
        if self.cluster != now.cluster:
            return False
        if self.id == now.id:
            return self.restarts < now.restarts
        command = ["squeue", "--noheader", "--format=%T", f"--jobs={self.id}"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_QUEUE_S)
        except (OSError, subprocess.TimeoutExpired):
            return False  # nobody can say
        if asked.returncode:
            return "Invalid job id" in asked.stderr  # long ended, and forgotten
        return not asked.stdout.strip()


def sign(partial: Path, job: SlurmJob | None) -> None:
    """Say in an unfinished folder which job is at it; None: a process of none, which nobody can ask about."""
    if job:
        (partial / _JOB).write_text(json.dumps(asdict(job)))
    else:
        (partial / _JOB).unlink(missing_ok=True)
