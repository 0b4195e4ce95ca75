"""One launch at a time in a run folder: two would rename each other's checkpoints and share one metrics file."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from pathlib import Path

from llmtrain.errors import UserError

_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class RunLock:
    """Holds `run.dir/.lock` until released or until the process is gone, however it goes."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / ".lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock; nothing happens if it is held already, or if there is no folder yet.

        Raises:
            UserError: another launch holds it (host and process are named), or the folder cannot be written.
        """
        if self._descriptor is not None or not self._path.parent.is_dir():
            return
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"{self._path.parent}: cannot be written: {error.strerror}; choose another run.dir"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            if error.errno in _UNSUPPORTED:  # a file system without locks: nothing to hold on to
                self._descriptor = descriptor
                return
            os.close(descriptor)
            raise UserError(
                f"{self._path.parent}: another launch is running in it ({holder or 'unknown'}); wait for it, stop it, "
                "or choose another run.dir"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
