"""Whether one more checkpoint fits on the disk."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

from llmtrain.engine import Engine


class Room:
    """Measured by all ranks before any of them writes: a rank that looked later would count what others have written.

    A disk that is full only while a save fails would fail the run's other files, too.
    """

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._needed = self._free = 0
        self._is_told = False

    def measure(self, engine: Engine, own_bytes: int) -> None:
        """Add up what the ranks will write, `own_bytes` here, for the shares differ; rank 0 looks at the disk."""
        free = _free(self._run_dir) if engine.rank == 0 else 0
        told = engine.gather((own_bytes, free))
        self._needed, self._free = sum(size for size, _ in told), told[0][1]

    def require(self) -> list[str]:
        """Return what to warn of, once: that less than two more checkpoints fit.

        Raises:
            OSError: not one fits; the same on all ranks.
        """
        numbers = f"{self._free / 1e6:,.1f} MB are free, a checkpoint takes {self._needed / 1e6:,.1f} MB"
        if self._free < self._needed:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {numbers}")
        if self._free >= 2 * self._needed or self._is_told:
            return []
        self._is_told = True
        return [f"{self._run_dir}: the disk is nearly full: {numbers}; free some, or keep fewer"]


def _free(folder: Path) -> int:
    """Free bytes where the folder is, or will be."""
    try:
        return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
    except OSError:
        return sys.maxsize  # what is wrong there fails the save itself, which tells it
