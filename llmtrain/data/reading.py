"""Rows of ids out of the files of a stream: one of a megabyte, or thousands that hold twenty terabytes.

A stream of up to `MAPPED_BYTES` in up to `OPEN_FILES` files is memory-mapped; from one file all rows of a micro-batch
are gathered in one call. Of anything larger every row is one `pread` into its place. For a mapping

- takes a page of page tables (4 KB of each process) for every 2 MB that a row was ever read from: over an epoch of
  20 TB they grow to 40 GB; and the kernel allows 65,530 of them;
- reads 128 KB around what is not in the page cache, where `pread` of scattered rows reads the pages of the row: good
  for a stream that soon lies there whole, and slow by far for one that does not;
- ends the process by SIGBUS where a file was cut off, so its size is asked for before each use.

So memory does not grow with the stream, nor with what was read of it, beyond 8 MB: a few numbers for each file, and
at most `OPEN_FILES` of them open.
"""

from __future__ import annotations

import errno
import os
import resource
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llmtrain.errors import CorruptError, LlmtrainError, UserError

MAPPED_BYTES = 1 << 32  # which the page cache may well hold; 8 MB of page tables, were all of it read
OPEN_FILES = 256  # of each stream; a mixture has several
_WANTED_FILES = 1 << 16
Ids = npt.NDArray[np.integer[Any]]
Int64s = npt.NDArray[np.int64]


class IdFile(NamedTuple):
    """Where ids lie: so many of `stored` dtype in the file at `path`, from byte `begin` on."""

    path: str
    begin: int
    tokens: int
    stored: np.dtype[Any]

    @property
    def end(self) -> int:
        """The byte after the last id."""
        return self.begin + self.tokens * self.stored.itemsize


class RowReader:
    """Reads rows of a stream that lies in files one after another, none of them empty.

    Files are opened when something is read from them, also in a process that this was sent to.
    """

    def __init__(self, files: Sequence[IdFile], dtype: np.dtype[Any]):
        self.files, self.dtype = list(files), dtype
        allow_open_files()
        self.bounds: list[int] = np.cumsum([0, *(file.tokens for file in files)]).tolist()  # token each begins at
        is_plain = all(file.stored == dtype for file in files)  # ids of another width are widened, row by row
        size = self.bounds[-1] * dtype.itemsize
        # Memory of ids at an odd byte is not copied into that of others; so far only a manifest by hand has such.
        is_aligned = not any(file.begin % dtype.itemsize for file in files)
        self.is_mapped = is_plain and is_aligned and len(files) <= OPEN_FILES and size <= MAPPED_BYTES
        # Of each file the token and the byte it begins at, and the token after it.
        table = [self.bounds[:-1], [file.begin for file in files], self.bounds[1:]]
        self._plain = np.array(table, np.int64) if is_plain else None
        self._let_go()

    def _let_go(self) -> None:
        self._maps: dict[int, Ids] = {}  # by number of the file
        self._views: dict[int, Ids] = {}  # of all rows of a length, by that
        self._open: dict[int, _OpenFile] = {}  # by number, the one opened first is first

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_views": {}, "_open": {}}

    def rows(self, starts: Int64s, length: int) -> Ids:
        """(len(starts), length) ids in a fresh buffer, the rows from each start on.

        Raises:
            CorruptError: a file is gone, was cut off or cannot be read.
        """
        if self.is_mapped and len(self.files) == 1 and len(starts):
            whole = self._mapped(0)
            if length not in self._views:
                self._views[length] = np.lib.stride_tricks.sliding_window_view(whole, length)
            return self._views[length][starts]  # half the time of a call for each row; the view copies nothing
        rows = np.empty((len(starts), length), self.dtype)
        self.fill(rows.reshape(-1), np.arange(len(starts)) * length, np.full(len(starts), length), starts)
        return rows

    def fill(self, target: Ids, begins: Int64s, lengths: Int64s, starts: Int64s) -> None:
        """Fill stretches of an array with ids of the stream.

        Args:
            target: (ids,) of the stream's dtype.
            begins: (stretches,) where each begins in the array.
            lengths: (stretches,) how many ids it has.
            starts: (stretches,) where they begin in the stream.

        Raises:
            CorruptError: a file is gone, was cut off or cannot be read.
        """
        if not len(starts):
            return
        numbers, places = self._places(starts, lengths)
        stretches = zip(begins.tolist(), (begins + lengths).tolist(), starts.tolist(), numbers, places, strict=True)
        maps = {number: self._mapped(number).data for number in set(numbers) - {-1}} if self.is_mapped else {}
        memory = target.data  # slices of memory are copied in a third of the time that slices of arrays take
        for begin, end, start, number, place in stretches:
            if number in maps:
                memory[begin:end] = maps[number][place : place + end - begin]
                continue
            opened = self._open.get(number)  # held, so that no other thread closes it meanwhile
            if opened is None or not _is_read(opened.descriptor, memory[begin:end], place):
                self.read_into(target[begin:end], start)

    def _places(self, starts: Int64s, lengths: Int64s) -> tuple[list[int], list[int]]:
        """For each start the file that has all of its row, or -1; and where in it, in ids if mapped, else in bytes."""
        if self._plain is None:
            return [-1] * len(starts), [0] * len(starts)
        first, begin, after = self._plain
        numbers = np.searchsorted(after, starts, "right")
        places = starts - first[numbers]
        if not self.is_mapped:
            places = places * self.dtype.itemsize + begin[numbers]
        numbers[starts + lengths > after[numbers]] = -1
        return numbers.tolist(), places.tolist()

    def read_into(self, row: Ids, start: int) -> None:
        """Fill a row with the ids from `start` on, across files.

        Raises:
            CorruptError: a file is gone, was cut off or cannot be read.
        """
        number = bisect_right(self.bounds, start) - 1
        while True:
            file, skipped = self.files[number], start - self.bounds[number]
            here = row[: file.tokens - skipped]
            if self.is_mapped:
                here[:] = self._mapped(number)[skipped : skipped + len(here)]
            else:
                # Ids of another width are widened on the way.
                target = here if file.stored == self.dtype else np.empty(len(here), file.stored)
                self._read(number, target, file.begin + skipped * file.stored.itemsize)
                if target is not here:
                    here[:] = target
            if len(here) == len(row):
                return
            row, number = row[len(here) :], number + 1  # what is read goes on in the next file
            start = self.bounds[number]

    def _mapped(self, number: int) -> Ids:
        """All ids of a file that is still as long as it was, and there: asked by name, as a host asks a server."""
        file = self.files[number]
        if problem := _cut_off(file.path, file.end):
            raise CorruptError(problem)
        if number not in self._maps:
            try:
                mapped = np.memmap(file.path, file.stored, "r", file.begin, file.tokens)
            except OSError as error:
                raise _unreadable(file.path, error) from error
            # A plain array over the mapping: slicing np.memmap itself costs microseconds more each time. The same dtype
            # by name, too: little-endian is as native, but memory of both is not copied into each other.
            self._maps[number] = np.asarray(mapped).view(self.dtype)
        return self._maps[number]

    def _read(self, number: int, target: Ids, at: int) -> None:
        open_file = self._open.get(number) or self._open_file(number)
        try:
            if os.preadv(open_file.descriptor, (target.data,), at) == target.nbytes:
                return
            self._read_on(open_file, target, at)
        except OSError as error:
            self._open.pop(number, None)
            raise _unreadable(self.files[number].path, error) from error
        except EOFError:
            self._open.pop(number, None)
            path = self.files[number].path
            raise CorruptError(_cut_off(path, self.files[number].end) or f"{path}: ended too early") from None

    def _read_on(self, open_file: _OpenFile, target: Ids, at: int) -> None:
        """Once more from the start: one call may return less than it could."""
        memory, done = target.view(np.uint8).data, 0
        while done < len(memory):
            count = os.preadv(open_file.descriptor, (memory[done:],), at + done)
            if not count:
                raise EOFError
            done += count

    def _open_file(self, number: int) -> _OpenFile:
        path = self.files[number].path
        try:
            opened = _OpenFile(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        while len(self._open) >= OPEN_FILES:
            self._open.pop(next(iter(self._open)), None)
        self._open[number] = opened
        return opened


class _OpenFile:
    """A descriptor that is closed when nobody reads from it any more, whichever thread that is."""

    __slots__ = ("descriptor",)

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the exit, `os` may be gone before
        if hasattr(self, "descriptor"):
            close(self.descriptor)


def _is_read(descriptor: int, row: memoryview, place: int) -> bool:
    """Whether one call has filled the row: nearly always. What is wrong otherwise, `read_into` finds out."""
    try:
        return os.preadv(descriptor, (row,), place) == row.nbytes
    except OSError:
        return False


def _cut_off(path: str, expected: int) -> str | None:
    try:
        size = os.stat(path).st_size  # noqa: PTH116 -- for every micro-batch, and a Path takes as long again
    except PermissionError:  # what is mapped stays readable
        return None
    except OSError as error:
        return _cannot_be_read(path, error)
    return (
        None if size >= expected else f"{path}: was cut off to {size} bytes while it was read; prepare the data again"
    )


def _unreadable(path: str, error: OSError) -> LlmtrainError:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        problem = f"{path}: cannot be opened: {error.strerror}"
        return UserError(f"{problem}; raise the limit on open files (ulimit -n), or use larger shards")
    return CorruptError(_cannot_be_read(path, error))


def allow_open_files(wanted: int = _WANTED_FILES) -> None:
    """Raise this process's own limit on open files, as far as it may by itself.

    Systems set it to 1,024 for the sake of select(2), which nothing here uses; a mixture of several sources needs more.
    """
    if sys.platform != "linux":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _cannot_be_read(path: str, error: OSError) -> str:
    return f"{path}: is gone while it is read ({error.strerror}); put it back, and start the run again"
