"""A folder on a store: what is written is read back, damage is found, and failures are the user's kind of error."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llmtrain.errors import CorruptError, UserError
from llmtrain.storage.remote import Remote, RemoteError, path_or_url
from tests.storage.conftest import Bucket


@pytest.fixture(params=["memory", "file", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    if request.param == "s3":
        bucket: Bucket = request.getfixturevalue("bucket")
        return Remote(f"{bucket.url}/run/")
    return Remote(f"memory://{tmp_path}/run" if request.param == "memory" else f"file://{tmp_path}/run")


def test_files_of_a_web_server_have_sizes(tmp_path: Path) -> None:
    """Its list of them has none."""
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "ids.bin").write_bytes(b"0123456789")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = Remote(f"http://127.0.0.1:{server.server_port}/part")
        digest = hashlib.sha256(b"0123456789").hexdigest()
        assert found.problems([("ids.bin", 10, digest)]) == []
        assert len(found.problems([("ids.bin", 11, digest), ("none.bin", 1, digest)])) == 2
        server.shutdown()


def test_every_kind_of_store_does_the_same(remote: Remote, tmp_path: Path) -> None:
    assert remote.sizes() == {} and remote.read("a") is None
    local, content = tmp_path / "local", b"0123456789" * 1000
    local.write_bytes(content)
    remote.upload(local, "step/tokenizer/part")
    remote.write("latest", b"step\n")
    assert remote.sizes() == {"step/tokenizer/part": 10_000, "latest": 5}
    assert remote.sizes("step") == {"step/tokenizer/part": 10_000}
    assert remote.read("latest") == b"step\n"
    digest = hashlib.sha256(content).hexdigest()
    assert remote.hashed("step/tokenizer/part") == (10_000, digest)
    remote.fetch("step/tokenizer/part", tmp_path / "back/part", digest)
    assert (tmp_path / "back/part").read_bytes() == content
    with pytest.raises(CorruptError, match="differs from the hash"):
        remote.fetch("step/tokenizer/part", tmp_path / "back/part", "0" * 64)
    remote.move("step/tokenizer/part", "aside/part")
    assert remote.sizes() == {"aside/part": 10_000, "latest": 5}
    remote.remove(["latest", "never-there"])
    remote.check_writable()
    assert remote.sizes() == {"aside/part": 10_000}
    with pytest.raises(RemoteError, match=r"run/none: cannot be read: "):
        remote.hashed("none")
    with pytest.raises(FileNotFoundError):
        remote.upload(tmp_path / "none", "none")


def test_on_a_mounted_disk_a_file_is_whole_or_not_there_and_on_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a run folder: a marker that survives a power cut vouches for files that do, too."""
    deeds: list[str] = []

    def plain(path: Path) -> str:
        return re.sub(r"\..*-\d+-\d+\.", ".", path.name)  # without the writer

    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        deeds.append(f"fsync {plain(Path(f'/proc/self/fd/{descriptor}').readlink())}")
        fsync(descriptor)

    def noted_replace(path: Path, target: str) -> Path:
        assert path.stat().st_size == 10_000 and not (tmp_path / "run/step/file").exists()
        deeds.append(f"rename {plain(path)}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    (tmp_path / "local").write_bytes(bytes(10_000))
    (tmp_path / "run").mkdir()
    remote = Remote(f"file://{tmp_path}/run")
    remote.upload(tmp_path / "local", "step/file")
    assert deeds == ["fsync run", "fsync file.unfinished", "rename file.unfinished", "fsync step"]
    assert remote.sizes() == {"step/file": 10_000}


def test_what_does_not_fit_on_a_mounted_disk_leaves_nothing_there(tmp_path: Path) -> None:
    """It is tried again and again: each try would leave a part of the file, until there is room for none."""
    local, remote = tmp_path / "local", Remote(f"file://{tmp_path}/run")
    local.write_bytes(bytes(1 << 20))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
    try:
        for put in (lambda: remote.upload(local, "step/big"), lambda: remote.write("big", bytes(1 << 20))):
            with pytest.raises(RemoteError, match=r"big: cannot be written: .*File too large"):
                put()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert remote.sizes() == {}


def test_a_full_disk_here_is_not_blamed_on_the_store(remote: Remote) -> None:
    remote.write("big", bytes(1 << 20))
    with pytest.raises(OSError, match="No space left"):
        remote.fetch("big", Path("/dev/full"), "")


@pytest.mark.parametrize(
    "url", ["s3://user:secret@bucket/run", "s3://bucket/run?key=secret", "simplecache::s3://bucket/run"]
)
def test_urls_that_would_leak_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="refused") as caught:
        Remote(url)
    assert "secret" not in str(caught.value)


def test_urls_and_paths_are_told_apart() -> None:
    assert path_or_url("s3://bucket/run/") == "s3://bucket/run"
    assert path_or_url("runs/one") == Path("runs/one")
