"""What a Slurm job left on another host is gone on with once that job has ended, and only then."""

from __future__ import annotations

import json
import os
import platform
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.data.parts import prepare_all
from llmtrain.data.takeover import SlurmJob
from llmtrain.errors import UserError
from llmtrain.prepare import Options
from tests.data.test_begun import content, lines, small_chunks  # noqa: F401 -- a fixture


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
    last_line = json.loads((left / "journal.jsonl").read_text().splitlines()[-1])
    is_open = left / "data" / last_line["splits"]["train"]["open_ids"]["path"]
    said: list[str] = []
    with ExitStack() as still_lives:  # a process that Slurm took for dead
        written = [left / "journal.jsonl", is_open, is_open.with_suffix(".ends")]
        handles = [still_lives.enter_context(path.open("ab", buffering=0)) for path in written]
        mend(options)
        on(monkeypatch, "b", CLUSTER_NAME="c", JOB_ID="7", RESTART_COUNT="1")
        prepare_all(options, say=said.append)
        for handle in handles:
            handle.write(b"rubbish")
    assert "joined.partial-b-kept: taken over from joined.partial-a-kept, which Slurm job 7 left" in said[0]
    assert "going on behind" in said[1]
    on(monkeypatch, "a")
    prepare_all(replace(options, out=tmp_path / "whole"), say=print)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not (tmp_path / "out.parts").exists()


@pytest.mark.parametrize(
    "job",
    [
        {},
        {"CLUSTER_NAME": "c", "JOB_ID": "7"},
        {"CLUSTER_NAME": "other", "JOB_ID": "7", "RESTART_COUNT": "1"},
        {"CLUSTER_NAME": "c", "JOB_ID": "8"},  # and nobody says whether 7 has ended
        {"CLUSTER_NAME": "c", "JOB_ID": "7; true", "RESTART_COUNT": "1"},
    ],
)
def test_what_may_still_be_at_it_keeps_it(options, monkeypatch, job):
    left = stopped_on_a(options, monkeypatch, CLUSTER_NAME="c", JOB_ID="7")
    before, said = content(left), list[str]()
    on(monkeypatch, "b", **job)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="not JSON"):
        prepare_all(options, say=said.append)
    assert not any("taken over" in line or "going on" in line for line in said)
    assert content(left) == before


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


def test_what_was_left_elsewhere_goes_before_what_lies_here(options, monkeypatch):
    left = stopped_on_a(options, monkeypatch, CLUSTER_NAME="c", JOB_ID="7")
    here = left.with_name("joined.partial-b-kept")
    shutil.copytree(left, here)
    (here / "mark").touch()
    on(monkeypatch, "b", CLUSTER_NAME="c", JOB_ID="7", RESTART_COUNT="1")
    with pytest.raises(UserError, match="not JSON"):
        prepare_all(options, say=print)
    assert not left.exists() and not (here / "mark").exists()
    assert SlurmJob.of(here) == SlurmJob(cluster="c", id="7", restarts=1)
