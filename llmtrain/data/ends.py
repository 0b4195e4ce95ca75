"""The file of a shard that says where its documents end, written in pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from llmtrain.data.hashed_file import HashedFile
from llmtrain.data.shards import FileInfo


class EndsWriter:
    """Writes `.ends` of one shard; memory stays small however many documents there are."""

    def __init__(self, path: Path):
        self._file, self._last = HashedFile(path), 0

    def append(self, ends: npt.NDArray[np.int64]) -> None:
        """Add rising positions after last tokens; documents without tokens are left out."""
        data = ends[np.diff(ends, prepend=self._last) > 0].astype("<i8")
        if len(data):
            self._last = int(data[-1])
            self._file.write(data.data)

    def finish(self, tokens: int) -> tuple[int, FileInfo]:
        """End the last document with the shard of so many tokens; return how many there are, and the file."""
        self.append(np.array([tokens], np.int64))
        info = self._file.close()
        return info.bytes // 8, info

    def close(self) -> None:
        """Let go of the file, whole or not."""
        self._file.close()
