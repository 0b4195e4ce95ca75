"""One pass over the ids of a split: how often each occurs, how long documents are, which documents are the same.

Memory does not grow with the tokens: 8 bytes for each id of the vocabulary, and 16 for each document (its length and a
hash of its ids), about twice that while they are put together. Measured speeds are in docs/LOG.md.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtrain.data.reading import Ids
from llmtrain.data.shards import Manifest, Report, ShardInfo, outside_vocabulary
from llmtrain.errors import CorruptError

HASH_BYTES = 8
AT_ONCE_BITS = 22  # 2²² hashes are sorted at once


@dataclass(frozen=True)
class Scan:
    """What is known of a split after one pass."""

    counts: npt.NDArray[np.int64]  # (vocabulary,) how often each id occurs
    lengths: npt.NDArray[np.int64]  # (documents,) in tokens, the end-of-document id included
    hashes: npt.NDArray[np.uint64]  # (documents,) equal for equal ids; for others by chance, n² / 2⁶⁵ times in n


def scan_split(folder: Path, manifest: Manifest, name: str, report: Report) -> Scan:
    """Read all ids of a split, a few megabytes at a time.

    Args:
        folder: the prepared data.
        manifest: its manifest.
        name: of the split.
        report: is told of the bytes that were read.

    Raises:
        CorruptError: an id outside the vocabulary, or ends of documents that are not in order or not those counted.
        OSError: a file cannot be read.
    """
    dtype, vocab_size = np.dtype(manifest.dtype).newbyteorder("<"), manifest.tokenizer.vocab_size
    counts = np.zeros(vocab_size, np.int64)
    documents = _Documents()
    for shard in manifest.splits[name].shards:
        ends, position = _ends(folder, shard), 0
        for block in shard.blocks(folder, dtype):
            _check_ids(block, shard, folder, position, vocab_size)
            counts += np.bincount(block, minlength=vocab_size)
            first, last = np.searchsorted(ends, [position, position + len(block)], "right").tolist()
            # Files in place may be narrower than others of the same split: equal ids must be equal bytes.
            documents.add(block.astype(dtype, copy=False), ends[first:last] - position)
            position += len(block)
            report(block.nbytes)
    return Scan(counts, *documents.finish())


class _Documents:
    """Lengths and hashes of documents whose ids come block by block."""

    def __init__(self) -> None:
        self._hash = self._new_hash()
        self._hashes = bytearray()
        self._lengths: list[npt.NDArray[np.int64]] = []
        self._open = 0  # ids of the document that has not ended yet

    def add(self, ids: Ids, ends: npt.NDArray[np.int64]) -> None:
        """Take the next ids, and the places among them after which a document ends."""
        self._lengths.append(np.diff(ends, prepend=-self._open))
        data, size, begin = np.ascontiguousarray(ids).view(np.uint8).data, ids.dtype.itemsize, 0
        for end in (ends * size).tolist():
            self._hash.update(data[begin:end])
            self._hashes += self._hash.digest()
            self._hash, begin = self._new_hash(), end
        self._hash.update(data[begin:])
        self._open = len(ids) - begin // size + (0 if len(ends) else self._open)

    def finish(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Return the lengths and the hashes; ids after the last end are no document."""
        return np.concatenate([np.empty(0, np.int64), *self._lengths]), np.frombuffer(self._hashes, np.uint64)

    def _new_hash(self) -> Any:
        return hashlib.blake2b(digest_size=HASH_BYTES)


def _ends(folder: Path, shard: ShardInfo) -> npt.NDArray[np.int64]:
    path = folder / shard.ends.path
    ends = np.fromfile(path, "<i8")
    limits = np.concatenate(([0], ends, [shard.tokens]))
    if len(ends) != shard.documents or (np.diff(limits) < 0).any():
        raise CorruptError(f"{path}: not the rising ends of {shard.documents} documents; prepare the data again")
    return ends


def _check_ids(block: Ids, shard: ShardInfo, folder: Path, position: int, vocab_size: int) -> None:
    if int(block.max()) >= vocab_size:
        first = int(np.argmax(block >= vocab_size))
        place = shard.place(position + first)
        raise CorruptError(outside_vocabulary(shard.path(folder), int(block[first]), place, vocab_size))


@dataclass(frozen=True)
class Repeats:
    """Documents that occur several times in a split, the most frequent first."""

    documents: npt.NDArray[np.int64]  # the number of the first of each
    times: npt.NDArray[np.int64]


def repeats(hashes: npt.NDArray[np.uint64]) -> Repeats:
    """Find equal hashes.

    Sorted 2²² at a time, by the first bits of the hash, so that it takes about 100 MB however many there are.
    """
    bits = max(0, (len(hashes) - 1) >> AT_ONCE_BITS).bit_length()
    documents, times = [], []
    for part in range(1 << bits):
        numbers = np.flatnonzero(hashes >> np.uint64(64 - bits) == part) if bits else np.arange(len(hashes))
        numbers = numbers[np.argsort(hashes[numbers], kind="stable")]
        starts = np.flatnonzero(np.diff(hashes[numbers], prepend=~hashes[numbers[:1]]))
        counts = np.diff(starts, append=len(numbers))
        documents.append(numbers[starts[counts > 1]])
        times.append(counts[counts > 1])
    every, counts = np.concatenate(documents), np.concatenate(times)
    order = np.lexsort((every, -counts))
    return Repeats(every[order], counts[order])


def found_in(few: npt.NDArray[np.uint64], many: npt.NDArray[np.uint64]) -> int:
    """Count those of `few` that are also in `many`, of which a part is looked at at a time."""
    kinds, times = np.unique(few, return_counts=True)
    is_found = np.zeros(len(kinds), bool)
    for begin in range(0, len(many) if len(kinds) else 0, 1 << AT_ONCE_BITS):
        part = many[begin : begin + (1 << AT_ONCE_BITS)]
        places = np.searchsorted(kinds, part).clip(max=len(kinds) - 1)
        is_found[places[kinds[places] == part]] = True
    return int(times[is_found].sum())
