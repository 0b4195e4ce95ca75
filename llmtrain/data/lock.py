"""One process at a time, also across machines that share a file system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import random
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

_HELD = {errno.EAGAIN, errno.EACCES}
_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_GLANCE_S = 0.01  # longer than `is_locked` shares a lock to see whether it is free, unless it loses the processor
_GLANCES = 500  # that many are waited for, a few seconds


class FileLock:
    """Holds a file until released or until the process is gone, however it goes.

    `flock` reaches across machines on NFS and on Lustre mounted with `-o flock`. Elsewhere it may reach one machine
    only, or not work at all (`is_exclusive` is False then): what must not happen twice has to be safe by other means.
    """

    def __init__(self, path: Path):
        self.path = path
        self.is_exclusive = True
        self._descriptor: int | None = None
        # A forked data worker that outlives this process must not hold the lock for it.
        lock = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _release(lock()))

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self) -> str | None:
        """Take the lock and return None; return who holds it (``process 12 on host``) if another does.

        Raises:
            OSError: the file cannot be made.
        """
        if self.is_held:
            return None
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take(descriptor)
            is_ours = _is_at(self.path, descriptor)
        except OSError as error:
            is_ours = error.errno in _UNSUPPORTED
            if not is_ours and error.errno not in _HELD:
                os.close(descriptor)
                raise
            if is_ours:  # a file system without locks: nothing to hold on to
                self.is_exclusive = False
        if not is_ours:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            return holder or "a process unknown"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{holder_name(os.getpid())}\n".encode(), 0)
        self._descriptor = descriptor
        return None

    @contextlib.contextmanager
    def held(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold it for a block, after waiting for whoever has it, who is told once.

        Raises:
            OSError: the file cannot be made.
        """
        told = None
        while holder := self.acquire():
            if holder != told:
                waiting(holder)
            told = holder
            time.sleep(0.2)
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def holder_name(pid: int) -> str:
    """What `FileLock.acquire` calls a process of this host."""
    return f"process {pid} on {platform.node()}"


def is_locked(path: Path) -> bool | None:
    """Whether a process holds the lock in this file, which is left as it is.

    None: that cannot be seen from here, as with a lock that another host has held, for it may reach that host only.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # there was never a lock, or it is not ours to read
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
    except OSError as error:
        return True if error.errno in _HELD else None
    finally:
        os.close(descriptor)
    return False if holder.endswith(f" on {platform.node()}") else None


def _take(descriptor: int) -> None:
    """Lock the file. Whoever only looks shares the lock for a moment: that is waited for, a lock of one's own is not.

    Raises:
        OSError: another holds it, or the file system has no locks.
    """
    for _ in range(_GLANCES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in _HELD:
                raise
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        time.sleep(random.uniform(0.1, 1) * _GLANCE_S)  # two that start at once do not meet again and again
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still there: whoever held the lock may have removed it, and the next make another."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(lock: FileLock | None) -> None:
    if lock:
        lock.release()
