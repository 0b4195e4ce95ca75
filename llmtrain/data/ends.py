"""The file of a shard that says where its documents end, written in pieces."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmtrain.data.shards import FileInfo


class EndsWriter:
    """Writes `.ends` of one shard; memory stays small however many documents there are."""

    def __init__(self, path: Path):
        self._path, self._file, self._digest = path, path.open("wb"), hashlib.sha256()
        self._count = self._last = 0

    def append(self, ends: npt.NDArray[np.int64]) -> None:
        """Add rising positions after last tokens; documents without tokens are left out."""
        data = ends[np.diff(ends, prepend=self._last) > 0].astype("<i8")
        if len(data):
            self._count, self._last = self._count + len(data), int(data[-1])
            self._file.write(data.data)
            self._digest.update(data.data)

    def finish(self, tokens: int) -> tuple[int, FileInfo]:
        """End the last document with the shard of so many tokens; return how many there are, and the file."""
        self.append(np.array([tokens], np.int64))
        self._file.close()
        info = FileInfo(path=self._path.name, bytes=8 * self._count, sha256=self._digest.hexdigest())
        return self._count, info

    def close(self) -> None:
        """Let go of the file, whole or not."""
        self._file.close()
