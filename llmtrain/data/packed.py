"""Packed windows, read by an index on the disk: what a process needs does not grow with the documents.

An index is a pure function of where documents end, of `seq_len` and of the id that ends them. It is made once for a
machine and kept in its cache, and then read as ids are (`data/reading.py`): mapped, or with one call for each window.

    windows.bin   of each window: int64 its first piece, uint32 its targets, uint32 its pieces
    pieces.bin    of each piece: int64 where it begins in the stream, uint32 where in its row, uint32 its ids
    index.json    how many there are, what they are made of, and both files with their sizes and hashes
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmtrain.data.documents import document_groups
from llmtrain.data.hashed_file import HashedFile
from llmtrain.data.order import Int64s
from llmtrain.data.outside import SHA256, hash_samples
from llmtrain.data.packing import Bools, cut, pack
from llmtrain.data.reading import IdFile, RowReader
from llmtrain.data.shards import FileInfo, Manifest, SplitInfo, TokenDataset, TokenStream
from llmtrain.data.staging import make_once
from llmtrain.errors import CorruptError, UserError
from llmtrain.storage.cache import cache_folder, cache_folders, say

INDEX = "index.json"
_VERSION = 1  # of what is written, and of what is packed together
_CACHE = "packed"
_WORDS = 2  # of 8 bytes, in each record of either file


class IndexInfo(BaseModel):
    """`index.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    content: str = Field(pattern=SHA256)  # of the split that is packed, see `_content`
    digest: str = Field(pattern=SHA256)  # of the pieces, see `PackedWindows.digest`
    windows: int = Field(ge=0)
    pieces: int = Field(ge=0)
    targets: int = Field(ge=0)
    files: tuple[FileInfo, FileInfo]  # of windows, and of pieces
    samples_sha256: tuple[str, str]  # `hash_samples` of both


class PackedWindows:
    """As `Windows`, but packed.

    Args:
        stream: the tokens.
        seq_len: inputs of a window, and targets and padding.
        document_end: the id that closes documents; windows are padded with it.
        folder: where their index lies.

    Raises:
        CorruptError: the index is not as it was written.
    """

    def __init__(self, stream: TokenStream, seq_len: int, document_end: int, folder: Path):
        self.stream, self.seq_len, self.padding, self._folder = stream, seq_len, document_end, folder
        self._info = read_index(folder)
        files = []
        for file, samples, count in zip(
            self._info.files, self._info.samples_sha256, (self._info.windows, self._info.pieces), strict=True
        ):
            path = folder / file.path
            try:
                is_whole = path.stat().st_size == file.bytes == 8 * _WORDS * count and _samples(folder, file) == samples
            except OSError as error:
                raise CorruptError(damaged(f"{path}: cannot be read ({error.strerror})", folder)) from error
            if not is_whole:
                raise CorruptError(damaged(f"{path}: was changed since it was written", folder))
            files.append(IdFile(str(path), 0, _WORDS * count, np.dtype("<i8")))
        self._windows, self._pieces = (RowReader([file] if file.tokens else [], file.stored) for file in files)

    def __len__(self) -> int:
        return self._info.windows

    @property
    def pieces(self) -> int:
        """Documents and parts of such in all windows."""
        return self._info.pieces

    @property
    def targets(self) -> int:
        """In all windows."""
        return self._info.targets

    def digest(self) -> str:
        """Equal exactly when the windows are made of the same pieces; SHA-256, in hex."""
        return self._info.digest

    def count_targets(self, ids: Int64s) -> Int64s:
        """Targets in each of the windows `ids`, shape (n,); the rest is padding."""
        return self._of(ids)[1]

    def gather(self, ids: Int64s) -> torch.Tensor:
        """Read windows `ids` as (len(ids), seq_len + 1) tokens in the stored dtype.

        row[1:] are the targets; padding is what of them is the end-of-document id after another, up to the row's end.

        Raises:
            CorruptError: a file is gone or was changed; or an id is outside the vocabulary, and where.
        """
        width = self.seq_len + 1
        first, _, counts = self._of(ids)
        pieces = np.empty(_WORDS * int(counts.sum()), np.int64)
        with self._naming_the_index():
            self._pieces.fill(pieces, _WORDS * _sums_before(counts), _WORDS * counts, _WORDS * first)
        starts, places, lengths = _columns(pieces.reshape(-1, _WORDS))
        if not (_lie_within(starts, lengths, len(self.stream)) and _lie_within(places, lengths, width)):
            raise self._changed(1)
        rows = np.full((len(ids), width), self.padding, self.stream.dtype)
        begins = places + np.repeat(np.arange(len(ids)) * width, counts)
        self.stream.fill(rows.reshape(-1), begins, lengths, starts)
        if self.stream.has_wrong_id(rows):
            for start, length in zip(starts, lengths.tolist(), strict=True):
                self.stream.gather(start[None], length)  # which names it
        return torch.from_numpy(rows)

    def _of(self, ids: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """Of each window its first piece, its targets and how many pieces it has."""
        with self._naming_the_index():
            records = self._windows.rows(_WORDS * ids, _WORDS)
        first, targets, counts = _columns(records)
        most = max(int(np.maximum.reduce(column, initial=0)) for column in (targets, counts))
        if most > self.seq_len or not _lie_within(first, counts, self.pieces):
            raise self._changed(0)
        return first, targets, counts

    @contextmanager
    def _naming_the_index(self) -> Iterator[None]:
        """What helps against a damaged file of ids does not help here."""
        try:
            yield
        except CorruptError as error:
            problem, _, advice = str(error).rpartition("; ")
            raise CorruptError(damaged(problem or advice, self._folder)) from error

    def _changed(self, number: int) -> CorruptError:
        path = self._folder / self._info.files[number].path
        return CorruptError(damaged(f"{path}: was changed since it was written", self._folder))


def open_packed(data: TokenDataset, split: str, seq_len: int, document_end: int, group: int) -> PackedWindows:
    """The windows of a split, packed `group` documents at a time; their index is made where this machine has none.

    Of several processes of a machine one makes it, and the others wait for it.

    Raises:
        UserError: it cannot be written.
        CorruptError: document ends are damaged (see `document_groups`), or the index is.
    """
    stream, info = data.split(split), data.manifest.splits[split]
    content = _content(info)
    folder = cache_folder(_CACHE, json.dumps([_VERSION, content, seq_len, document_end, group]))

    def make(staged: Path) -> None:
        say(f"packing {info.documents:,} documents of {data.path} into windows of {seq_len}, once, to {folder}")
        # A document longer than a window makes a piece for each that it fills; nearly all windows are half full at
        # least. Beside records of 16 bytes there is what the digest is of: 12 bytes a piece, 8 a window.
        filled = info.tokens // seq_len
        pieces = info.documents + filled
        wanted = (16 + 12) * pieces + (16 + 8) * min(pieces, 2 * filled + 1)
        if (free := shutil.disk_usage(staged).free) < wanted:
            raise UserError(f"{staged}: has {free / 1e6:,.1f} MB free, and an index may take {wanted / 1e6:,.1f}")
        groups = ((ends, _are_closed(stream, ends, document_end)) for ends in document_groups(data, split, group))
        _write(staged, content, seq_len, groups)

    try:
        make_once(folder, make, is_made=(folder / INDEX).is_file, say=say, task=f"packing {data.path}")
    except UserError as error:
        raise UserError(f"{error}; data.packing: best_fit needs it: set LLMTRAIN_CACHE to another folder") from error
    return PackedWindows(stream, seq_len, document_end, folder)


def indices_of(manifest: Manifest) -> Iterator[Path]:
    """The indices of prepared data in this machine's cache; whose those are that cannot be read, nobody can say."""
    contents = {_content(split) for split in manifest.splits.values()}
    for folder in cache_folders(_CACHE):
        with suppress(CorruptError):
            if read_index(folder).content in contents:
                yield folder


def _content(split: SplitInfo) -> str:
    """Equal exactly when the documents of a split are; SHA-256, in hex."""
    content = [(shard.ids.sha256, shard.tokens, shard.ends.sha256) for shard in split.shards]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_index(folder: Path) -> IndexInfo:
    """What an index says of itself.

    Raises:
        CorruptError: it cannot be read.
    """
    try:
        return IndexInfo.model_validate_json((folder / INDEX).read_bytes())
    except OSError as error:
        raise CorruptError(damaged(f"{folder / INDEX}: cannot be read ({error.strerror})", folder)) from error
    except ValidationError as error:
        raise CorruptError(damaged(f"{folder / INDEX}: {error.errors()[0]['msg']}", folder)) from error


def damaged(problem: str, folder: Path) -> str:
    """What is wrong with an index, and what to do."""
    return f"{problem}; delete {folder}, which is made again"


def _write(folder: Path, content: str, seq_len: int, groups: Iterable[tuple[Int64s, Bools]]) -> None:
    """Pack groups of documents, of which is given where they end, and whether the id that ends them is there."""
    windows, pieces = HashedFile(folder / "windows.bin"), HashedFile(folder / "pieces.bin")
    columns = [TemporaryFile(dir=folder) for _ in range(3)]  # noqa: SIM115 -- gone with the process; for the digest
    begin, targets = 0, 0
    for ends, closed in groups:
        cuts = cut(np.concatenate(([begin], ends)), closed, seq_len)
        window_of = pack(cuts.lengths, ~cuts.open, seq_len)
        counts = np.bincount(window_of)
        fills = np.bincount(window_of, cuts.lengths).astype(np.int64)
        first = _sums_before(counts) + pieces.bytes // (8 * _WORDS)
        windows.write(_records(first, fills, counts))
        # A rest first, then as they were placed or, of equal windows, in the stream.
        cuts = cuts.take(np.lexsort((cuts.open, window_of)))
        # What opens and what closes a document stands in the row already, also where the stream has none; of a piece
        # that does not open one, the token before its first target is read too.
        places = _sums_before(cuts.lengths) - np.repeat(_sums_before(fills), counts) + cuts.open
        pieces.write(_records(cuts.begins - ~cuts.open, places, cuts.lengths - cuts.close + ~cuts.open))
        for file, column in zip(columns, (cuts.begins, cuts.lengths, first), strict=True):
            file.write(np.ascontiguousarray(column).view(np.uint8).data)
        begin, targets = int(ends[-1]), targets + int(fills.sum())
    count = pieces.bytes // (8 * _WORDS)
    columns[-1].write(count.to_bytes(8, "little"))
    files = windows.close(), pieces.close()  # synced with the folder
    info = IndexInfo(
        content=content,
        digest=_digest(columns),
        windows=files[0].bytes // (8 * _WORDS),
        pieces=count,
        targets=targets,
        files=files,
        samples_sha256=(_samples(folder, files[0]), _samples(folder, files[1])),
    )
    (folder / INDEX).write_text(info.model_dump_json())


def _digest(columns: Iterable[IO[bytes]]) -> str:
    digest = hashlib.sha256()
    for file in columns:
        file.seek(0)
        while data := file.read(1 << 20):
            digest.update(data)
        file.close()
    return digest.hexdigest()


def _records(words: Int64s, *halves: npt.NDArray[np.integer[Any]]) -> memoryview:
    """The bytes of records."""
    records = np.empty((len(words), _WORDS), "<i8")
    records[:, 0] = words
    records.view("<u4").reshape(-1, 2 * _WORDS)[:, 2:] = np.stack(halves, axis=1)
    return records.reshape(-1).view(np.uint8).data


def _samples(folder: Path, file: FileInfo) -> str:
    return hash_samples(folder / file.path, 0, file.bytes)


def _are_closed(stream: TokenStream, ends: Int64s, document_end: int) -> Bools:
    """Whether each document ends with the id: all but those that a file of tokens broke off."""
    closed = np.ones(len(ends), np.bool_)
    at_end = np.flatnonzero(np.isin(ends, stream.bounds[1:]))
    closed[at_end] = stream.gather(ends[at_end] - 1, 1)[:, 0] == document_end
    return closed


def _columns(records: npt.NDArray[np.integer[Any]]) -> tuple[Int64s, Int64s, Int64s]:
    """The numbers in records: a word, and the halves of another; of damaged ones the word alone may be negative."""
    halves = records.view("<u4").reshape(-1, 2 * _WORDS)[:, 2:].astype(np.int64)
    return records.view(np.int64)[:, 0], halves[:, 0], halves[:, 1]


def _lie_within(begins: Int64s, lengths: Int64s, end: int) -> bool:
    """Whether no stretch begins before 0 or ends after `end`."""
    return int(np.minimum.reduce(begins, initial=0)) == 0 and int(np.maximum.reduce(begins + lengths, initial=0)) <= end


def _sums_before(values: npt.NDArray[np.integer[Any]]) -> Int64s:
    sums = np.cumsum(values, dtype=np.int64)
    sums -= values
    return sums
