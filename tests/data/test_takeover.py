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
from tests.data.inputs import content, lines
from tests.data.test_parts import two_days_ago


@pytest.fixture
def options(tmp_path: Path, small_chunks: None) -> Options:
    """An input of many shards whose end may not be read yet."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_bytes(lines(90, "line"))
    (tmp_path / "texts" / "b.jsonl").write_bytes(b"bad!\n")
    return Options((str(tmp_path / "texts"),), tmp_path / "out", "byte", shard_tokens=700, workers=1)


def on(monkeypatch: pytest.MonkeyPatch, host: str, **job: str) -> None:
    """From now on this is a process on that host, in that job."""
    monkeypatch.setattr(platform, "node", lambda: host)
    for name in ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURMD_NODENAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
        monkeypatch.setenv("SLURMD_NODENAME", host)


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
        ("printf 'error: no server\\nfatal: no source\\n' >&2; exit 1", "has ended (fatal: no source)"),
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


@pytest.mark.parametrize("failing", ["sign", "_remove_abandoned", "make_folder"])
def test_a_disk_that_is_still_full_costs_no_finished_shard(options, monkeypatch, failing):
    left = stopped_on_a(options, monkeypatch, CLUSTER_NAME="c", JOB_ID="7")
    shards = len(content(left))
    on(monkeypatch, "b", CLUSTER_NAME="c", JOB_ID="7", RESTART_COUNT="1")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(staging, failing, full)
        for _ in range(2):
            with pytest.raises(UserError, match="No space left on device"):
                prepare_all(options, say=print)
    (kept,) = left.parent.glob("joined.partial-*-kept")
    assert len(content(kept)) == shards
    said: list[str] = []
    with pytest.raises(UserError, match="not JSON"):
        prepare_all(options, say=said.append)
    assert any("going on behind" in line for line in said)


def test_one_that_comes_to_it_while_squeue_is_asked_keeps_it(options, tmp_path, monkeypatch):
    left = stopped_on_a(options, monkeypatch, CLUSTER_NAME="c", JOB_ID="7")
    nobody = SlurmJob("c", "9", 0)

    def asked(*_: object) -> None:
        takeover.sign(left, nobody)

    monkeypatch.setattr(SlurmJob, "why_alive", asked)
    on(monkeypatch, "b", CLUSTER_NAME="c", JOB_ID="8")
    with pytest.raises(UserError, match="not JSON"):
        prepare_all(options, say=print)
    assert SlurmJob.of(left) == nobody


def test_a_shell_on_a_login_node_is_in_no_job(monkeypatch):
    on(monkeypatch, "login", CLUSTER_NAME="c", JOB_ID="7")
    assert SlurmJob.current() == SlurmJob("c", "7", 0)
    monkeypatch.delenv("SLURMD_NODENAME")
    assert SlurmJob.current() is None


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


def test_of_several_the_one_that_came_farthest_is_taken(options, monkeypatch):
    left = stopped_on_a(options, monkeypatch, CLUSTER_NAME="c", JOB_ID="7")
    whole = (left / "journal.jsonl").read_text().splitlines(keepends=True)
    others = {"a0": whole[:1], "z": whole[:2], "empty": [], "damaged": ["rubbish\n"]}
    for host, lines_there in others.items():
        other = shutil.copytree(left, left.with_name(f"joined.partial-{host}-kept"))
        (other / "journal.jsonl").write_text("".join(lines_there))
    assert len(whole) > 2
    on(monkeypatch, "b", CLUSTER_NAME="c", JOB_ID="7", RESTART_COUNT="1")
    said: list[str] = []
    with pytest.raises(UserError, match="not JSON"):
        prepare_all(options, say=said.append)
    assert "taken over from joined.partial-a-kept" in said[0] and "going on behind" in said[1]
    assert not left.exists() and SlurmJob.of(left.with_name("joined.partial-b-kept")) == SlurmJob("c", "7", 1)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_lies_here_is_never_given_up_for_what_lies_elsewhere(options, monkeypatch, is_damaged):
    left = stopped_on_a(options, monkeypatch, CLUSTER_NAME="c", JOB_ID="7")
    here = shutil.copytree(left, left.with_name("joined.partial-b-kept"))
    whole = (here / "journal.jsonl").read_text().splitlines(keepends=True)
    (here / "journal.jsonl").write_text("rubbish\n" if is_damaged else "".join(whole[:2]))
    before = content(left)
    on(monkeypatch, "b", CLUSTER_NAME="c", JOB_ID="7", RESTART_COUNT="1")
    with pytest.raises(UserError, match="cannot be gone on with" if is_damaged else "not JSON"):
        prepare_all(options, say=print)
    assert content(left) == before
    assert SlurmJob.of(here) == SlurmJob("c", "7", 1)
