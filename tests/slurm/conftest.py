"""One cluster for all tests here, and a folder in which a user of it would type `sbatch`."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.conftest import records, small_config
from tests.slurm.cluster import Cluster, Job, missing, wait_until

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two idle nodes."""
    if reason := missing():
        pytest.skip(reason)
    # Not pytest's folder: the path of munge's socket may have 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="llmtrain-slurm-") as folder, Cluster(Path(folder)) as running:
        yield running


@dataclass
class Site:
    """The root of a repository as its user has it, on that cluster."""

    cluster: Cluster
    root: Path
    data: Path

    def config(self, name: str, max_steps: int) -> Path:
        """A small config whose run folder is `name`."""
        config = small_config(self.data, self.root / name)
        config["training"] |= {"max_steps": max_steps, "eval_every": 40}
        config["checkpoint"]["save_every"] = 40
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def sbatch(self, *arguments: object, **environment: str) -> str:
        """Submit as a user would; return the job's number."""
        return self.cluster.submit(*map(str, arguments), cwd=self.root, **{**SITE, **environment})

    def log(self, job: Job | str) -> str:
        """What the job has printed."""
        job_id = job.id if isinstance(job, Job) else job
        return "".join(path.read_text(errors="replace") for path in (self.root / "logs").glob(f"*-{job_id}.out"))

    def done(self, job_id: str, timeout_s: float = 240) -> Job:
        """Wait until the job is over; it must have succeeded."""
        job = self.cluster.wait(job_id, timeout_s=timeout_s)
        assert job.state == "COMPLETED", f"{job}\n{self.log(job)}"
        return job

    def wait_for_steps(self, job_id: str, run: str) -> None:
        """Wait until a job takes steps in that run folder."""
        metrics = self.root / run / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and b"\n" in metrics.read_bytes(), 150, lambda: self.log(job_id))

    def training(self, job_id: str, run: str) -> dict[int, int]:
        """Wait until a job of two processes takes steps in that run folder; return rank → pid."""
        self.wait_for_steps(job_id, run)
        ranks = self.cluster.ranks(job_id)
        assert sorted(ranks) == [0, 1], (ranks, self.log(job_id))
        return ranks

    @contextmanager
    def frozen_until_told_to_stop(self, ranks: dict[int, int]) -> Iterator[None]:
        """Stop the time of a training, which else would be done in seconds, until Slurm has signalled all its ranks."""
        for pid in ranks.values():
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
            wait_until(lambda: all(map(is_told_to_stop, ranks.values())), 150, "no stop signal came")
        finally:
            for pid in ranks.values():
                os.kill(pid, signal.SIGCONT)

    def shorten_time_limit(self, job_id: str) -> None:
        """Let a running job's time be over as soon as Slurm can still signal first: it looks every half minute.

        The shortest limit from the start, a minute, could be met before the first step where the machine is busy.
        """
        self.cluster.run("scontrol", "update", f"JobId={job_id}", "EndTime=now+40")

    def wait_for_requeue(self, job_id: str) -> None:
        """Wait until the job is back in the queue; let it begin without Slurm's two minutes of pause, and finish."""
        wait_until(lambda: self.cluster.job(job_id).restarts == 1, 60, lambda: self.log(job_id))
        # Those minutes have a reason: what a node still has to report of the first start would end the second. That
        # may be on its way even when all are idle.
        wait_until(self.cluster.is_idle, 60, lambda: self.log(job_id))
        self.cluster.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+10", "TimeLimit=10")


def is_told_to_stop(pid: int) -> bool:
    """Whether a stop signal waits for a frozen process, or has reached it because Slurm has woken it."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return bool(pending & (1 << signal.SIGUSR1 - 1 | 1 << signal.SIGTERM - 1)) or "T (stopped)" not in status["State"]


# What a site would have in its slurm/site.env; here set at submission, so that the file is as shipped.
SITE = {
    "LLMTRAIN_VENV": sys.prefix,
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture
def site(cluster: Cluster, data: Path, tmp_path: Path) -> Site:
    """An own folder with the scripts, the launch files and the package of this repository, and no logs yet."""
    for name in ("slurm", "launch", "llmtrain"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "logs").mkdir()
    return Site(cluster, tmp_path, data)


def losses(run_dir: Path) -> dict[int, tuple[float, float | None]]:
    """Step → training and validation loss of every record."""
    return {record["step"]: (record["train_loss"], record["val_loss"]) for record in records(run_dir)}
