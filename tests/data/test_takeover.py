"""What a Slurm job left on another host is gone on with once that job has ended, and only then."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.data import staging, takeover
from llmtrain.data.parts import prepare_all
from llmtrain.data.takeover import SlurmJob
from llmtrain.errors import UserError
from llmtrain.prepare import Options
from tests.data.test_begun import content, lines, small_chunks  # noqa: F401 -- a fixture
from tests.data.test_parts import two_days_ago


@pytest.fixture
def options(tmp_path: Path, small_chunks: None) -> Options:  # noqa: F811
    """An input of many shards whose end may not be read yet."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(90, "line"))
    (tmp_path / "texts" / "b.jsonl").write_bytes(b"bad!\n")
    return Options((str(tmp_path / "texts"),), tmp_path / "out", "byte", shard_tokens=700, workers=1)


def on(monkeypatch: pytest.MonkeyPatch, host: str, **job: str) -> None:
    """From now on this is a process on that host, in that job."""
    monkeypatch.setattr(platform, "node", lambda: host)
    for name in ("CLUSTER_NAME", "JOB_ID", "RESTART_COUNT"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def stopped_on_a(options: Options, monkeypatch: pytest.MonkeyPatch, **job: str) -> Path:
    """Begin on a host and come upon the bad line; return what was finished."""
    on(monkeypatch, "a", **job)
    with pytest.raises(UserError, match="not JSON"):
        prepare_all(options, say=print)
    return options.out.parent / "out.parts" / "joined.partial-a-kept"


def mend(options: Options) -> None:
    """Make the bad line a blank one, in a file that looks as if it had not been changed."""
    bad = Path(options.inputs[0]) / "b.jsonl"
    before = bad.stat()
    bad.write_bytes(b"    \n")
    os.utime(bad, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_requeued_job_goes_on_on_another_host(options, tmp_path, monkeypatch):
    left = stopped_on_a(options, monkeypatch, CLUSTER_NAME="c", JOB_ID="7")
    whole, said = (left / "journal.jsonl").read_text().splitlines(keepends=True), list[str]()
    (left / "journal.jsonl").write_text("".join(whole[:2]))  # it wrote some shards after its last line
    is_open = left / "data" / json.loads(whole[1])["splits"]["train"]["open_ids"]["path"]
    behind = is_open.with_name(f"train-{int(is_open.stem[-5:]) + 1:05d}.bin")
    assert behind.exists()
    with ExitStack() as still_lives:  # a process that Slurm took for dead
        written = [left / "journal.jsonl", left / "journal.tmp", is_open, is_open.with_suffix(".ends"), behind]
        handles = [still_lives.enter_context(path.open("ab", buffering=0)) for path in written]
        on(monkeypatch, "b", CLUSTER_NAME="c", JOB_ID="7", RESTART_COUNT="1")
        with pytest.raises(UserError, match="not JSON"):
            prepare_all(options, say=said.append)
        for handle in handles:
            handle.write(b"rubbish\n")
        mend(options)
        prepare_all(options, say=said.append)
        for handle in handles:
            handle.write(b"rubbish\n")
    assert "joined.partial-b-kept: taken over from joined.partial-a-kept, whose Slurm job has ended" in said[0]
    assert "going on behind" in said[1]
    on(monkeypatch, "a")
    prepare_all(replace(options, out=tmp_path / "whole"), say=print)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not (tmp_path / "out.parts").exists()


@pytest.mark.parametrize(
    ("job", "why"),
    [
        ({}, "Slurm job 7 on 'c' cannot be asked about from here"),
        ({"CLUSTER_NAME": "c", "JOB_ID": "7"}, "it is of this very job, 7"),
        ({"CLUSTER_NAME": "other", "JOB_ID": "7", "RESTART_COUNT": "1"}, "cannot be asked about from here"),
        ({"CLUSTER_NAME": "c", "JOB_ID": "8"}, "nobody says whether Slurm job 7 has ended ("),
        ({"CLUSTER_NAME": "c", "JOB_ID": "7; true", "RESTART_COUNT": "1"}, "cannot be asked about from here"),
    ],
)
def test_what_may_still_be_at_it_keeps_it(options, monkeypatch, job, why):
    left = stopped_on_a(options, monkeypatch, CLUSTER_NAME="c", JOB_ID="7")
    before, said = content(left), list[str]()
    on(monkeypatch, "b", **job)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="not JSON"):
        prepare_all(options, say=said.append)
    assert said[0].startswith(f"{left}: finished shards of another host, not gone on with: ") and why in said[0]
    assert not any("taken over" in line or "going on" in line for line in said)
    assert content(left) == before
    two_days_ago(left)
    with pytest.raises(UserError, match="not JSON"):
        prepare_all(options, say=print)
    assert content(left) == before


RUNNING, ENDED = "Slurm job 7 is RUNNING", None


@pytest.mark.parametrize(
    ("squeue", "why"),
    [
        ("echo '7 RUNNING'", RUNNING),
        ("echo '7 COMPLETED'", ENDED),
        ("echo '9 RUNNING'; echo '7 TIMEOUT'", ENDED),  # a task of an array, which has the id of the array
        ("echo '9 RUNNING'", ENDED),  # and is forgotten
        ("echo '7 PENDING'; echo '7 FAILED'", "Slurm job 7 is PENDING and FAILED"),
        ("true", "Slurm job 7 is not listed"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", ENDED),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "(Unable to contact slurm controller)"),
        ("exit 3", "(squeue ended with 3)"),
        ("sleep 5", "timed out"),
        ('[ -z "$SQUEUE_STATES$SQUEUE_USERS" ] && echo "7 RUNNING"', RUNNING),
    ],
)
def test_what_squeue_says_decides(tmp_path, monkeypatch, squeue, why):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    monkeypatch.setattr(takeover, "_QUEUE_S", 1.0)
    found = SlurmJob("c", "7", 0).why_alive(SlurmJob("c", "8", 0))
    assert found is None if why is None else why in (found or "")


def test_a_disk_that_is_still_full_costs_no_finished_shard(options, monkeypatch):
    left = stopped_on_a(options, monkeypatch, CLUSTER_NAME="c", JOB_ID="7")
    before = content(left)
    on(monkeypatch, "b", CLUSTER_NAME="c", JOB_ID="7", RESTART_COUNT="1")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(staging, "sign", full)
        for _ in range(2):
            with pytest.raises(UserError, match=r"cannot be taken over \(No space left on device\); it stays"):
                prepare_all(options, say=print)
    assert content(left) == before
    said: list[str] = []
    with pytest.raises(UserError, match="not JSON"):
        prepare_all(options, say=said.append)
    assert "taken over" in said[0] and "going on behind" in said[1]


def test_of_a_folder_that_no_job_is_at_any_more_nobody_asks_the_last_one(options, monkeypatch):
    """The second process, which is in no job, may be alive."""
    left = stopped_on_a(options, monkeypatch, CLUSTER_NAME="c", JOB_ID="7")
    assert SlurmJob.of(left) == SlurmJob(cluster="c", id="7", restarts=0)
    assert SlurmJob.of(stopped_on_a(options, monkeypatch)) is None


@pytest.mark.parametrize("said", ["", "{", "[]", '{"cluster": "c", "id": 7, "restarts": 0}', '{"id": "7"}'])
def test_a_damaged_name_of_a_job_is_none(tmp_path, said):
    (tmp_path / "slurm-job.json").write_text(said)
    assert SlurmJob.of(tmp_path) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_of_another_user_nothing_is_taken(options, monkeypatch):
    left = stopped_on_a(options, monkeypatch, CLUSTER_NAME="c", JOB_ID="7")
    os.chown(left, 65534, 65534)
    assert SlurmJob.of(left) is None


@pytest.mark.parametrize(("lines_there", "is_taken"), [(None, True), (1, False), (0, False), ("damaged", False)])
def test_what_came_farthest_is_gone_on_with(options, monkeypatch, lines_there, is_taken):
    left = stopped_on_a(options, monkeypatch, CLUSTER_NAME="c", JOB_ID="7")
    here, journal = left.with_name("joined.partial-b-kept"), left / "journal.jsonl"
    shutil.copytree(left, here)
    whole = journal.read_text().splitlines(keepends=True)
    assert len(whole) > 2
    (here / "journal.jsonl").write_text("".join(whole[:2]))
    if lines_there is not None:
        journal.write_text("rubbish\n" if lines_there == "damaged" else "".join(whole[:lines_there]))
    on(monkeypatch, "b", CLUSTER_NAME="c", JOB_ID="7", RESTART_COUNT="1")
    said: list[str] = []
    with pytest.raises(UserError, match="not JSON"):
        prepare_all(options, say=said.append)
    assert any("taken over" in line for line in said) == is_taken
    assert any("going on behind" in line for line in said)
    assert left.exists() != is_taken
    assert SlurmJob.of(here) == SlurmJob("c", "7", 1)
