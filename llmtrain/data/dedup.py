"""Which documents are exact copies of an earlier one, in memory that does not grow with the input.

Several processes hash all documents. The records (128 bits of hash, ordinal) are sorted in memory as long as they are
few; more are dealt out to files by the first byte of the hash, and a file that is still too large by the next. The
result is a file of one byte for each record of the input, 1 where a document is a copy; it is looked up through a
memory map. Which copy stays, the first, does not depend on who did what when.

It costs one more reading of the input, and on the disk 24 to 48 bytes a document while it runs, one until the end.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.corpus import Chunk, ReadOptions, read_documents
from llmtrain.data.progress_bar import Report
from llmtrain.data.workers import ordered_map

DUPLICATES = "duplicates"
RECORD = np.dtype([("hash", "u1", 16), ("ordinal", "<i8")])
IN_MEMORY = 1 << 20  # records that are sorted at once: about 60 MB
Records = npt.NDArray[Any]
Marks = npt.NDArray[np.uint8]


def find_duplicates(
    chunks: Iterable[Chunk], reading: ReadOptions, folder: Path, *, workers: int, report: Report
) -> Path:
    """Write the marks of all copies to `folder/duplicates`; return its path; see `Copies`.

    Args:
        chunks: the whole input.
        reading: as the documents are read later.
        folder: for the marks, and for what is needed on the way.
        workers: number of processes.
        report: is told of the progress.

    Raises:
        UserError: bad input.
        OSError: `folder` cannot be written.
    """
    end = 0

    def hashed() -> Iterator[Records]:
        nonlocal end
        for records, source_bytes in ordered_map(partial(_Hasher, reading), chunks, workers, alike=True):
            if len(records):
                end = int(records["ordinal"][-1]) + 1
            report(source_bytes)
            yield records

    path, sorting = folder / DUPLICATES, folder / f"{DUPLICATES}.sorting"
    sorting.mkdir()
    path.touch()
    marks: Marks | None = None
    for ordinals in _copies(hashed(), sorting, 0):
        if marks is None and end:  # by the time the first is found, all are hashed
            marks = np.memmap(path, np.uint8, "w+", shape=(end,))
        if marks is not None:
            marks[ordinals] = 1
    sorting.rmdir()
    return path


class _Hasher:
    """Hashes the documents of chunks; each process makes its own."""

    def __init__(self, reading: ReadOptions):
        self._reading = reading

    def __call__(self, chunk: Chunk) -> tuple[Records, int]:
        hashes, ordinals = bytearray(), list[int]()
        for ordinal, text in read_documents(chunk, self._reading, Counter()):
            hashes += hashlib.blake2b(text.encode(), digest_size=16).digest()
            ordinals.append(ordinal)
        records = np.empty(len(ordinals), RECORD)
        records["hash"] = np.frombuffer(bytes(hashes), np.uint8).reshape(-1, 16)
        records["ordinal"] = ordinals
        return records, chunk.source_bytes


def _copies(pieces: Iterator[Records], folder: Path, depth: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the ordinals of copies among records whose hashes agree in `depth` bytes, and which come in order."""
    if depth == RECORD["hash"].shape[0]:  # all hashes agree, so all but the first are copies
        for number, records in enumerate(pieces):
            yield records["ordinal"][1 if number == 0 else 0 :]
        return
    held, count = list[Records](), 0
    for records in pieces:
        held.append(records)
        count += len(records)
        if count > IN_MEMORY:
            break
    else:
        yield _copies_in_memory(np.concatenate([*held, np.empty(0, RECORD)]))
        return
    for path in _dealt_out(chain(held, pieces), folder, depth):
        yield from _copies(_read_once(path), folder, depth + 1)


def _copies_in_memory(records: Records) -> npt.NDArray[np.int64]:
    halves = np.ascontiguousarray(records["hash"]).view("<u8")
    order = np.lexsort((records["ordinal"], halves[:, 1], halves[:, 0]))
    same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    return np.asarray(records["ordinal"][order[1:][same]], np.int64)


def _dealt_out(pieces: Iterator[Records], folder: Path, depth: int) -> list[Path]:
    """Write records to one file for each value of a byte of their hash, in the order in which they come."""
    paths, held, count = set[Path](), list[Records](), 0

    def write() -> None:
        records = np.concatenate([*held, np.empty(0, RECORD)])
        values = records["hash"][:, depth]
        order = np.argsort(values, kind="stable")
        limits = np.searchsorted(values[order], np.arange(257))
        for value in range(256):
            if limits[value] < limits[value + 1]:
                path = folder / f"{depth:02}-{value:02x}"
                with path.open("ab") as file:
                    file.write(records[order[limits[value] : limits[value + 1]]].tobytes())
                paths.add(path)

    for records in pieces:
        held.append(records)
        count += len(records)
        if count > IN_MEMORY:
            write()
            held, count = [], 0
    write()
    return sorted(paths)


def _read_once(path: Path) -> Iterator[Records]:
    """Read a file of records, and delete it: before what is in it is dealt out once more to others."""
    with path.open("rb") as file:
        while data := file.read(max(1, IN_MEMORY // 4) * RECORD.itemsize):
            yield np.frombuffer(data, RECORD)
    path.unlink()
