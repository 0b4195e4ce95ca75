"""Files of a run folder: replaced whole or appended line by line, so that a kill at any moment leaves them readable."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llmtrain.errors import UserError

LAUNCHES = "run.json"
SAMPLES = "samples.jsonl"  # what the model wrote
SKIPPED = "skipped.jsonl"  # steps that were not applied, and goings back

_TAIL_BYTES = 1 << 20  # no line is longer
# EFBIG and EDQUOT are how a file size limit and a cluster's quota say "full".
_USERS_TO_SOLVE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder into a `UserError` that names `path` and the reason."""
    try:
        yield
    except OSError as error:
        if error.errno not in _USERS_TO_SOLVE:
            raise
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; earlier checkpoints are intact: "
            "free space, or make the folder writable, and run the same command again to go on"
        ) from error


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path` at once when the block ends well; until then the old one stays.

    Unless `durable`, it is not synced to the device: after a power cut (not after a kill) it may be empty. That is for
    what can be made again from something durable.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


class LineAppender:
    """Appends whole lines, each in one write: a kill leaves at most one torn line, the last."""

    def __init__(self, path: Path):
        self._path = path
        with disk_errors(path):
            # Unbuffered: nothing is left behind in a buffer that would fail once more when the file is closed.
            self._file = path.open("ab", buffering=0)

    def append(self, line: str) -> None:
        """Append `line` and a newline, visible to other processes on return."""
        rest = memoryview(f"{line}\n".encode())
        with disk_errors(self._path):
            while rest:  # a nearly full disk takes a part, and refuses the next write with the reason
                rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        """Wait until the device has it all."""
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_steps(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects with a `step` in a file of lines, in order; torn and foreign lines are passed over."""
    with path.open("rb") as file:
        for line in file:
            if (entry := _parse(line)) is not None:
                yield entry


def last_step(path: Path) -> int:
    """The step of the last whole line of a file of lines in the order of steps; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        entries = map(_parse, reversed(file.read().splitlines()))
        return next((int(entry["step"]) for entry in entries if entry), 0)


def rewind(path: Path, step: int, keep: Callable[[dict[str, Any]], object] | None = None) -> None:
    """Drop the lines beyond `step`, and torn ones; hand each entry that stays to `keep`. No file is an empty file."""
    with disk_errors(path):
        if not path.exists():
            return
        with path.open("rb") as old, replacing(path, durable=True) as new:
            for line in old:
                entry = _parse(line)
                if entry is None or entry["step"] > step:
                    continue
                new.write(line.rstrip(b"\n") + b"\n")
                if keep is not None:
                    keep(entry)


def note_end(path: Path, end: dict[str, Any]) -> None:
    """Add how it ended (`provenance.ending`) to the last launch in `run.json`; one that is killed has none."""
    launches = json.loads(path.read_text(encoding="utf-8"))["launches"]
    launches[-1]["ended"] = end
    with replacing(path, durable=True) as file:
        file.write(json.dumps({"launches": launches}, indent=1).encode())


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line, parse_constant=_refuse)
    except ValueError:  # broken JSON or broken UTF-8
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
