"""The lock of a folder: held by a process, and by nothing that outlives it."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from llmtrain.checkpoint.lock import RunLock
from llmtrain.data.lock import FileLock, holder_name


def test_a_forked_child_that_outlives_its_parent_does_not_hold_the_lock(tmp_path: Path) -> None:
    """A data worker does, for seconds, after a kill -9; the same command could not be started again at once."""
    lock = FileLock(tmp_path / ".lock")
    assert lock.acquire() is None
    context = multiprocessing.get_context("fork")
    has_begun, go_on = context.Event(), context.Event()

    def live() -> None:
        has_begun.set()
        go_on.wait()

    child = context.Process(target=live)
    child.start()
    try:
        assert has_begun.wait(60)
        assert "process" in str(FileLock(tmp_path / ".lock").acquire())
        lock.release()  # as the end of the process would
        other = FileLock(tmp_path / ".lock")
        assert child.is_alive() and other.acquire() is None
        other.release()
    finally:
        go_on.set()
        child.join()


def test_who_only_looks_is_waited_for_and_who_holds_it_is_not(tmp_path: Path) -> None:
    """A process that looks at the lock may lose the processor while it shares it."""
    path = tmp_path / ".lock"
    with path.open("w") as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        threading.Timer(0.5, fcntl.flock, (looked_at, fcntl.LOCK_UN)).start()
        lock = FileLock(path)
        assert lock.acquire() is None
    assert FileLock(path).acquire() == holder_name(os.getpid())
    lock.release()


def test_a_file_system_without_locks_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    assert lock.warning is None
    lock.release()

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert "has no locks" in str(lock.warning)
    lock.release()
