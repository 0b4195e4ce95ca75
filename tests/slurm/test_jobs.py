"""The scripts in slurm/ on a real cluster of two nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import wait_until
from tests.slurm.conftest import Site, losses

pytestmark = pytest.mark.slow
ON_TWO_NODES = ("--nodes=2", "--gpus-per-node=1", "slurm/multi-node.sbatch")
ON_ONE_GPU = ("--gpus-per-node=1", "slurm/single-node.sbatch")
UNENDING = 100_000  # steps: it ends otherwise


@pytest.fixture(scope="session")
def finished() -> dict[str, Path]:
    """Run folders of two processes that nobody interrupted, by launch file."""
    return {}


@pytest.mark.parametrize("launch", ["cpu-zero2", ""])
def test_two_nodes_train_to_the_end(site: Site, finished: dict[str, Path], launch: str) -> None:
    """Where no launch file is named, it is `launch/multi-node-zero3.yaml`."""
    chosen = {"LLMTRAIN_LAUNCH_FILE": f"launch/{launch}.yaml"} if launch else {}
    job = site.sbatch(*ON_TWO_NODES, site.config("run", 100), **chosen)
    site.done(job)
    assert "2 processes" in site.log(job)
    assert (launch or "multi-node-zero3") in site.log(job)
    assert max(losses(site.root / "run")) == 100
    nodes = [path.relative_to(site.root / "logs").parts[1] for path in (site.root / "logs").rglob("stdout.log")]
    assert sorted(nodes) == ["node-0", "node-1"]
    finished[launch] = site.root / "run"


def test_a_job_that_meets_its_time_limit_requeues_itself_and_has_the_same_losses(
    site: Site, finished: dict[str, Path]
) -> None:
    if "" not in finished:
        site.done(site.sbatch(*ON_TWO_NODES, site.config("uninterrupted", 100)))
        finished[""] = site.root / "uninterrupted"
    job = site.sbatch("--time=10", "--signal=USR1@5", *ON_TWO_NODES, site.config("run", 100))
    with site.frozen_until_told_to_stop(site.training(job, "run")):
        site.shorten_time_limit(job)
        stopped_early = 0 < max(losses(site.root / "run")) < 100
    site.wait_for_requeue(job)
    done = site.done(job)
    log = site.log(job)
    assert stopped_early
    assert done.restarts == 1
    assert log.count("told to stop, and saved; back to the queue") == 1
    assert "by SIGUSR1; saved" in log
    assert losses(site.root / "run") == losses(finished[""])


def test_a_preempted_job_saves_and_goes_on_by_itself(site: Site) -> None:
    asked = {"SBATCH_PARTITION": "low", "SBATCH_GPUS_PER_NODE": "2", "LLMTRAIN_LAUNCH_FILE": "launch/cpu-ddp.yaml"}
    job = site.sbatch("--nodelist=n1", "slurm/single-node.sbatch", site.config("run", 240), **asked)
    urgent = ("--partition=high", "--nodelist=n1", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    with site.frozen_until_told_to_stop(site.training(job, "run")):
        preemptor = site.sbatch(*urgent)
    site.done(preemptor)
    site.wait_for_requeue(job)
    assert site.done(job).restarts == 1
    assert "by SIGTERM; saved" in site.log(job)
    assert max(losses(site.root / "run")) == 240


def test_a_killed_worker_ends_the_job_and_is_named_by_it_and_by_the_others(site: Site) -> None:
    config = site.config("run", UNENDING)
    job = site.sbatch(*ON_TWO_NODES, config, LLMTRAIN_LAUNCH_FILE="launch/cpu-ddp.yaml")
    ranks = site.training(job, "run")
    os.kill(ranks[1], signal.SIGKILL)
    failed = site.cluster.wait(job, timeout_s=60)
    # Rank 0 is alive and says what it lost: that is its exit code 5.
    assert (failed.state, failed.exit_code, failed.restarts) == ("FAILED", 5, 0), site.log(job)
    last = site.log(job).splitlines()[-1]
    assert "first to fail:" in last
    assert "rank 1 on node n2, exit code -9 (SIGKILL)" in last
    lost = next(line for line in site.log(job).splitlines() if "its process is gone" in line)
    assert "cannot go on" in lost
    assert "rank 1 on " in lost
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()), 10, "no process is left")


def test_a_cancelled_job_saves_and_stays_cancelled(site: Site) -> None:
    job = site.sbatch(*ON_ONE_GPU, site.config("run", UNENDING), LLMTRAIN_LAUNCH_FILE="launch/single.yaml")
    site.wait_for_steps(job, "run")
    site.cluster.run("scancel", job)
    cancelled = site.cluster.wait(job, timeout_s=60)
    assert (cancelled.state, cancelled.restarts) == ("CANCELLED", 0), site.log(job)
    assert "not requeued here" in site.log(job)
    assert (site.root / "run" / "latest").exists()


def test_bad_input_fails_with_its_exit_code_and_is_not_requeued(site: Site) -> None:
    config = site.config("run", UNENDING)
    job = site.sbatch(*ON_ONE_GPU, config, "optimizer.lr=fast", LLMTRAIN_LAUNCH_FILE="launch/single.yaml")
    failed = site.cluster.wait(job)
    assert (failed.state, failed.exit_code, failed.restarts) == ("FAILED", 2, 0), site.log(job)
    assert "llmtrain: error: " in site.log(job)


def test_in_a_container_one_process_trains_obeys_a_signal_and_is_evaluated(site: Site) -> None:
    inside = container(site)
    job = site.sbatch(*ON_ONE_GPU, site.config("run", UNENDING), LLMTRAIN_LAUNCH_FILE="launch/single.yaml", **inside)
    site.wait_for_steps(job, "run")
    site.cluster.run("scancel", "--signal=USR1", job)  # what Slurm sends before the time limit
    wait_until(lambda: site.cluster.job(job).restarts == 1, 60, lambda: site.log(job))
    site.cluster.run("scancel", job)
    assert "by SIGUSR1; saved" in site.log(job)

    job = site.sbatch("--gpus-per-node=1", "slurm/evaluate.sbatch", "run", "--json", **inside)
    site.done(job)
    result = next(json.loads(line) for line in site.log(job).splitlines() if line.startswith("{"))
    assert 0 < result["loss"] < 4


def container(site: Site) -> dict[str, str]:
    """Settings for a container in small: another root, in which alone the program is found, and signals set anew.

    Container runtimes start what is in them with default signal handling; `env --default-signal` does that here.
    """
    refused = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False).stderr
    if refused:
        pytest.skip(f"this machine gives no mount namespaces: {refused.strip()}")
    (site.root / "root").mkdir()
    wrapper = site.root / "container"
    wrapper.write_text(f"""#!/usr/bin/env bash
exec unshare --mount bash -c '
    set -euo pipefail
    mount --rbind / {site.root}/root
    mount -t tmpfs tmpfs {site.root}/root/mnt
    ln -s {sys.prefix} {site.root}/root/mnt/venv
    exec chroot {site.root}/root env --default-signal --chdir=/ PATH="/mnt/venv/bin:$PATH" "$@"
' container "$@"
""")
    wrapper.chmod(0o755)
    # Outside of it, there is no llmtrain.
    return {"LLMTRAIN_CONTAINER": str(wrapper), "LLMTRAIN_VENV": "", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
