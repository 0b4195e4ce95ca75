"""One launch at a time in a run folder: two would rename each other's checkpoints and share one metrics file."""

from __future__ import annotations

from pathlib import Path

from llmtrain.data.lock import FileLock
from llmtrain.errors import UserError


class RunLock:
    """Holds `run.dir/.lock` until released or until the process is gone, however it goes."""

    def __init__(self, run_dir: Path):
        self._lock = FileLock(run_dir / ".lock")

    def acquire(self) -> None:
        """Take the lock; nothing happens if it is held already, or if there is no folder yet.

        Raises:
            UserError: another launch holds it (host and process are named), or the folder cannot be written.
        """
        folder = self._lock.path.parent
        if not folder.is_dir():
            return
        try:
            holder = self._lock.acquire()
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another run.dir") from error
        if holder is not None:
            raise UserError(
                f"{folder}: another launch is running in it ({holder}); wait for it, stop it, or choose another run.dir"
            )

    @property
    def warning(self) -> str | None:
        """What it cannot do here."""
        if self._lock.is_exclusive:
            return None
        return f"{self._lock.path.parent}: this file system has no locks (flock); start no second launch in this folder"

    def release(self) -> None:
        """Give the lock back."""
        self._lock.release()
