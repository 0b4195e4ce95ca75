"""slurm/prepare-array.sbatch: an array of tasks prepares what one process would."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtrain.prepare import Options, prepare
from tests.slurm.cluster import wait_until

REPOSITORY = Path(__file__).parents[2]
SCRIPT = "slurm/prepare-array.sbatch"
TASKS = 3


def write_lines(path: Path, count: int) -> None:
    lines = (json.dumps({"text": f"{path.stem} {i} " + "some words " * (i % 9)}) + "\n" for i in range(count))
    path.write_text("".join(lines))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Nine megabytes in two files: three chunks."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a", "b"):
        write_lines(folder / f"{name}.jsonl", 70_000)
    return folder


def arguments(corpus: Path, out: Path, tokenizer: str = "char") -> list[str]:
    return ["--input", str(corpus), "--tokenizer", tokenizer, "--shard-tokens", "1000000", "--out", str(out)]


def assert_same_as_one_process(corpus: Path, out: Path, tmp_path: Path, tokenizer: str = "char") -> None:
    prepare(Options((str(corpus),), tmp_path / "one", tokenizer, shard_tokens=1_000_000))
    names = sorted(str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert all((out / name).read_bytes() == (tmp_path / "one" / name).read_bytes() for name in names)
    assert not out.with_name(f"{out.name}.parts").exists()


def task(number: int, first: int, *given: str, **environment: str) -> subprocess.Popen[str]:
    """One task of an array, with the variables that Slurm would give it; empty ones of `environment` are left out."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "LLMTRAIN"))}
    array = {
        "SLURM_ARRAY_TASK_ID": str(first + number),
        "SLURM_ARRAY_TASK_COUNT": str(TASKS),
        "SLURM_ARRAY_TASK_MIN": str(first),
        "SLURM_ARRAY_TASK_MAX": str(first + TASKS - 1),
        "SLURM_CPUS_ON_NODE": "1",
        "LLMTRAIN_VENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        ["bash", SCRIPT, *given],
        cwd=REPOSITORY,
        env={name: value for name, value in {**inherited, **array, **environment}.items() if value},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 5])
def test_tasks_at_once_prepare_what_one_process_would(corpus, tmp_path, first):
    out = tmp_path / "out"
    tasks = [task(number, first, *arguments(corpus, out)) for number in range(TASKS)]
    ends = [each.communicate(timeout=120) for each in tasks]
    assert [each.returncode for each in tasks] == [0] * TASKS, ends
    assert_same_as_one_process(corpus, out, tmp_path)
    again = task(1, first, *arguments(corpus, out))
    assert again.communicate(timeout=60)[0].startswith("already prepared: ")


@pytest.mark.slow
def test_what_the_user_says_of_workers_wins(corpus, tmp_path):
    process = task(0, 0, *arguments(corpus, tmp_path / "out"), "--workers", "nonsense")
    assert "argument --workers: must be a whole number of at least 1, not 'nonsense'" in process.communicate()[1]
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_ARRAY_TASK_ID": ""}, "not an array job: sbatch --array=0-15 slurm/prepare-array.sbatch"),
        ({"SLURM_ARRAY_TASK_MAX": "7"}, "--array must be one range without gaps"),
    ],
)
def test_what_is_no_whole_array_is_one_clear_line(environment: dict[str, Any], message: str) -> None:
    process = task(0, 0, "--out", "never", **environment)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("llmtrain: error: ") and message in err


@pytest.mark.slow
def test_a_real_array_job_prepares_what_one_process_would(site, corpus, tmp_path):
    out = tmp_path / "data" / "big"
    job = site.sbatch(f"--array=0-{TASKS - 1}", "--cpus-per-task=2", SCRIPT, *arguments(corpus, out))
    for number in range(TASKS):
        site.done(f"{job}_{number}")
    logs = [site.log(f"{job}_{number}") for number in range(TASKS)]
    assert sum(log.count("prepared: ") for log in logs) >= 1, logs
    assert_same_as_one_process(corpus, out, tmp_path)


@pytest.mark.slow
def test_a_task_that_is_requeued_while_it_fits_the_tokenizer_costs_nothing_but_time(site, corpus, tmp_path):
    out = tmp_path / "out"
    job = site.sbatch(f"--array=0-{TASKS - 1}", SCRIPT, *arguments(corpus, out, "word"))
    wait_until(lambda: list(tmp_path.glob("out.parts/plan.partial-*")), 60, lambda: site.log(f"{job}_0"))
    fitting = (tmp_path / "out.parts" / "plan.lock").read_text().split()[1]
    environment = Path(f"/proc/{fitting}/environ").read_bytes().split(b"\0")
    (number,) = [entry.decode().split("=")[1] for entry in environment if entry.startswith(b"SLURM_ARRAY_TASK_ID=")]
    requeued = f"{job}_{number}"
    site.cluster.run("scontrol", "requeue", requeued)
    wait_until(lambda: site.cluster.job(requeued).restarts == 1, 60, lambda: site.log(requeued))
    # Slurm would give it two minutes of pause. At once is too early: the end of the first start is still on its way to
    # the controller, which would take it for that of the second.
    site.cluster.run("scontrol", "update", f"JobId={requeued}", "StartTime=now+8")
    for number in range(TASKS):
        site.done(f"{job}_{number}")
    told = "".join(site.log(f"{job}_{number}") for number in range(TASKS))
    assert "which a killed process left unfinished" in told
    assert_same_as_one_process(corpus, out, tmp_path, "word")


@pytest.mark.slow
def test_what_a_job_left_on_another_host_is_gone_on_with_by_the_next(site, corpus, tmp_path):
    for name in "cdefgh":
        write_lines(corpus / f"{name}.jsonl", 140_000)
    out = tmp_path / "out"
    submitted = ("--array=0-0", SCRIPT, *arguments(corpus, out, "word"))
    first = f"{site.sbatch(*submitted)}_0"
    journals = lambda: [path for path in tmp_path.glob("out.parts/*/journal.jsonl") if path.stat().st_size]  # noqa: E731
    wait_until(journals, 60, lambda: site.log(first))
    site.cluster.run("scancel", "--signal=KILL", "--full", first)
    wait_until(lambda: site.cluster.job(first).state not in {"RUNNING", "COMPLETING"}, 60, lambda: site.log(first))
    (left,) = (path.parent for path in journals())
    left.rename(left.with_name(left.name.replace(platform.node(), "elsewhere")))

    second = f"{site.sbatch(*submitted)}_0"
    site.done(second)
    assert "-elsewhere-kept, whose Slurm job has ended" in site.log(second)
    assert "going on behind" in site.log(second)
    assert_same_as_one_process(corpus, out, tmp_path, "word")
