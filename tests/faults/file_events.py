"""Counts what a process does to a folder, and kills it (SIGKILL) at the n-th deed.

A deed is what changes the folder or makes a change last: open for writing, write, fsync, rename, link, delete, make or
remove a folder. It is killed before the deed, and in the middle of a write: half of the bytes are in the file then
(none, where the disk has larger blocks than that and the write goes past the page cache).
Writes are seen for what is opened in Python, by `open`, and for `os.write`; all else by its audit events.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate"}
DIRECTLY = " past the page cache"  # ends the name of such a write
_DIRECT = getattr(os, "O_DIRECT", 0)
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def die() -> NoReturn:
    """End this process at once, as a machine does that loses power or memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def path_of(descriptor: int) -> str:
    """Where an open file lies."""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _how(descriptor: int) -> str:
    return DIRECTLY if fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT else ""


class FileEvents:
    """From now on; `seen` names what was done, in order. Of the deeds with `of` in their names, the one `at` is it."""

    def __init__(self, folder: Path, at: int | None, end: Callable[[], None] = die, of: str = ""):
        self.seen: list[str] = []
        self._folder, self._at, self.end, self._of = str(folder), at, end, of
        self._met = 0
        self._is_on, self._lock = True, threading.Lock()
        sys.addaudithook(self._audit)
        self._fsync, os.fsync = os.fsync, self._counted_fsync
        self._write, os.write = os.write, self._counted_write
        self._open = io.open
        io.open = builtins.open = self._counted_open  # type: ignore[assignment]

    def stop(self) -> None:
        """Count no more."""
        self._is_on = False

    def is_ours(self, path: object) -> bool:
        """Whether a path lies in the folder."""
        return isinstance(path, (str, os.PathLike)) and str(path).startswith(self._folder)

    def count(self, what: str, path: object, how: str = "") -> bool:
        """Note a deed; return whether this is the one."""
        with self._lock:
            if not self._is_on:
                return False
            self.seen.append(f"{what} {path}{how}")
            self._met += self._of in self.seen[-1]
            return self._of in self.seen[-1] and self._met == self._at

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & _TO_WRITE if mode is None else set(mode) & set("wax+")
            if writes and self.is_ours(path) and self.count("open", path):
                self.end()
        elif event in _CHANGES:
            path = arguments[1] if event == "os.symlink" else arguments[0]
            # rmtree names what it deletes relative to the folder it is in.
            relative = event in ("os.remove", "os.rmdir") and not str(path).startswith("/")
            if (relative or self.is_ours(path) or self._is_file_of_ours(path)) and self.count(event, path):
                self.end()

    def _is_file_of_ours(self, descriptor: object) -> bool:
        return isinstance(descriptor, int) and path_of(descriptor).startswith(self._folder)

    def _counted_fsync(self, descriptor: int) -> None:
        if self._is_file_of_ours(descriptor) and self.count("fsync", path_of(descriptor)):
            self.end()
        self._fsync(descriptor)

    def _counted_write(self, descriptor: int, data: Any) -> int:
        if self._is_file_of_ours(descriptor) and self.count("write", path_of(descriptor), how=_how(descriptor)):
            view, half = memoryview(data).cast("B"), 0
            with contextlib.suppress(OSError):  # no whole number of blocks
                half = self._write(descriptor, view[: len(view) // 2])
            self.end()
            return half
        return self._write(descriptor, data)

    def _counted_open(self, file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any) -> Any:
        if not (self.is_ours(file) and set(mode) & set("wax+")):
            return self._open(file, mode, buffering, *text, **options)
        assert "+" not in mode, "not needed so far"
        raw = _TornFile(file, mode.replace("b", "").replace("t", ""))
        raw.events = self
        if buffering == 0:
            return raw
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **options)


class _TornFile(io.FileIO):
    """A file in which the fatal write stops half way."""

    events: FileEvents

    def write(self, data: Any, /) -> int:
        if self.events.count("write", self.name):
            view = memoryview(data).cast("B")
            half = super().write(view[: len(view) // 2])
            self.events.end()
            return half
        return super().write(data)
