"""A file that is hashed while it is written, and can be gone on with."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from llmtrain.data.shards import FileInfo

_AT_ONCE = 1 << 20


class HashedFile:
    """Writes `path` anew, or behind its first `begun` bytes; what lies behind those is dropped."""

    def __init__(self, path: Path, begun: int = 0):
        self.path, self.bytes, self._digest = path, begun, hashlib.sha256()
        if begun:
            with path.open("rb") as file:
                for begin in range(0, begun, _AT_ONCE):
                    self._digest.update(file.read(min(_AT_ONCE, begun - begin)))
            os.truncate(path, begun)
        else:
            path.unlink(missing_ok=True)  # and not written into: it may be open in another process
        self._file = path.open("ab" if begun else "wb")

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        self._digest.update(data)
        self.bytes += self._file.write(data)

    def sync(self) -> FileInfo:
        """Wait until all that was written is on the disk; return what that is."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._info()

    def close(self) -> FileInfo:
        """Let go of the file; return what a manifest says of it."""
        self._file.close()
        return self._info()

    def _info(self) -> FileInfo:
        return FileInfo(path=self.path.name, bytes=self.bytes, sha256=self._digest.hexdigest())
