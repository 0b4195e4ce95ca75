"""Documents out of sources: inputs → files → chunks → documents.

1. `find_files` (`data/files.py`) turns what the user typed into a list of files in a fixed order.
2. `cut_into_chunks` deals the files out as pieces of work of a few megabytes: names of text files, lines of JSONL, row
   groups of Parquet. It reads no more than it must, so that whoever takes a chunk does the reading and parsing.
3. `chunk.read` yields the documents of a chunk, one at a time, each with its ordinal: its place among all records of
   the input, bad ones included, which is the same however the work is dealt out.

Every chunk knows its `Position`, from which the cutting can go on elsewhere without reading what lies before.

A text file is one document; so is a JSONL line, a Parquet row, or an example of a Hugging Face dataset.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import IO, Protocol, TypeVar

from llmtrain.data import memory
from llmtrain.data.compressed import open_bytes
from llmtrain.data.files import SourceFile
from llmtrain.data.hub import DatasetShard
from llmtrain.data.json_lines import count_newlines, parse_line
from llmtrain.data.refine import NO_CHANGE, Copies, Refinement
from llmtrain.data.text_column import open_parquet
from llmtrain.errors import UserError

CHUNK_BYTES = 4 << 20
MAX_ROWS = 1 << 16  # of a dataset in one chunk: rows without text have no bytes
LARGE_GROUP = 8  # times a chunk: whoever takes a row group has all of it in memory, and writers make them of any size
# As git and grep do: a NUL byte near the beginning means that a file is no text.
BINARY_PROBE_BYTES = 8192
Skipped = Counter[str]


@dataclass(frozen=True)
class ReadOptions:
    """How documents are taken out of records: the JSONL field or Parquet column, whether bad ones are skipped, what is
    done to each, and which are left out as copies.
    """

    text_field: str = "text"
    skip_bad: bool = False
    refine: Refinement = NO_CHANGE
    copies: Copies | None = None

    def bad(self, what: str, message: str, skipped: Skipped) -> None:
        """Count a bad record if such are to be skipped, else refuse it."""
        if not self.skip_bad:
            raise UserError(f"{message}; mend it, or leave such {what} out with --skip-bad")
        skipped[f"bad {what}"] += 1


@dataclass(frozen=True)
class Position:
    """Where a chunk begins.

    Args:
        file: index of its (first) file.
        place: in that file: bytes of JSONL once it is decompressed, row groups of Parquet (the first of whose rows may
            be done), or rows of a dataset.
        record: how many records of that file come before it: lines, rows.
        ordinal: how many records of the whole input come before it.
    """

    file: int = 0
    place: int = 0
    record: int = 0
    ordinal: int = 0

    def after(self, records: int, places: int) -> Position:
        """So many records and places later in the same file."""
        return Position(self.file, self.place + places, self.record + records, self.ordinal + records)


BEGINNING = Position()


@dataclass(frozen=True)
class TextChunk:
    """Whole text files, each one document."""

    start: Position
    files: tuple[SourceFile, ...]

    @property
    def source_bytes(self) -> int:
        """How much of the input files this is, for progress."""
        return sum(file.bytes for file in self.files)

    def read(self, options: ReadOptions, skipped: Skipped) -> Iterator[tuple[int, str]]:
        """Yield (ordinal, text) of each document."""
        for ordinal, file in enumerate(self.files, self.start.ordinal):
            text = _read_text(file, options, skipped)
            if text:
                yield ordinal, text
            elif text is not None:
                skipped["empty documents"] += 1


@dataclass(frozen=True)
class LinesChunk:
    """Whole lines of a JSONL file, not yet parsed.

    Args:
        start: of the first line.
        file: which they are in.
        source_bytes: how much of the file they are.
        data: the lines where the file is compressed; None: they are to be read, so many bytes from `start` on. To send
            them to another process takes longer than that.
    """

    start: Position
    file: SourceFile
    source_bytes: int
    data: bytes | None

    def read(self, options: ReadOptions, skipped: Skipped) -> Iterator[tuple[int, str]]:
        """Yield (ordinal, text) of each line's document."""
        data = self._read_again() if self.data is None else self.data
        for index, line in enumerate(io.BytesIO(data)):  # a line at a time: there may be one, of all memory
            if line.isspace():
                continue
            try:
                text = parse_line(line, options.text_field)
            except ValueError as error:
                options.bad("lines", f"{self.file.path}: line {self.start.record + index + 1}: {error}", skipped)
                continue
            if text:
                yield self.start.ordinal + index, text
            else:
                skipped["empty documents"] += 1

    def _read_again(self) -> bytes:
        with open_bytes(self.file.path, self.file.compression) as (stream, _):
            status = os.fstat(stream.fileno())
            stream.seek(self.start.place)
            data = stream.read(self.source_bytes)
        # Another file's lines could have the ordinals of this one's.
        if (status.st_size, status.st_mtime_ns) != (self.file.bytes, self.file.modified_ns):
            raise UserError(f"{self.file.path}: was changed while it was read; prepare it once it stays as it is")
        return data


@dataclass(frozen=True)
class RowsChunk:
    """One row group of a Parquet file, not yet read."""

    start: Position
    file: SourceFile
    source_bytes: int

    def read(self, options: ReadOptions, skipped: Skipped) -> Iterator[tuple[int, str]]:
        """Yield (ordinal, text) of each row's document."""
        with open_parquet(self.file.path, options.text_field) as column:
            rows = chain.from_iterable(column.rows(self.start.place, self.start.record))
            yield from _decoded(rows, self.file, self.start, options, skipped)


@dataclass(frozen=True)
class ExamplesChunk:
    """Rows of a streamed dataset or a large row group, not yet decoded: whoever goes through it has read them."""

    start: Position
    file: SourceFile
    rows: tuple[bytes | None, ...]
    source_bytes: int

    def read(self, options: ReadOptions, skipped: Skipped) -> Iterator[tuple[int, str]]:
        """Yield (ordinal, text) of each row's document."""
        yield from _decoded(self.rows, self.file, self.start, options, skipped)


RecordsChunk = LinesChunk | RowsChunk | ExamplesChunk
Chunk = TextChunk | RecordsChunk


def source_of(chunk: Chunk, ordinal: int) -> int:
    """The number of the input that a document of a chunk is from."""
    file = chunk.files[ordinal - chunk.start.ordinal] if isinstance(chunk, TextChunk) else chunk.file
    return file.source


def place_of(chunk: Chunk, ordinal: int) -> str:
    """What an error calls a document of a chunk: its file, and where it is one of many, its line or row there."""
    number = ordinal - chunk.start.ordinal
    if isinstance(chunk, TextChunk):
        return str(chunk.files[number].path)
    record = chunk.start.record + number
    return f"{chunk.file.path}: {f'line {record + 1}' if isinstance(chunk, LinesChunk) else f'row {record}'}"


def read_documents(chunk: Chunk, options: ReadOptions, skipped: Skipped) -> Iterator[tuple[int, str]]:
    """Yield (ordinal, text) of each document of a chunk that is to be used, as it is to be used."""
    if options.refine == NO_CHANGE and options.copies is None:
        yield from chunk.read(options, skipped)
        return
    for ordinal, text in chunk.read(options, skipped):
        if (refined := options.refine(text, skipped)) is None:
            continue
        if options.copies is not None and ordinal in options.copies:
            skipped["copies of earlier documents"] += 1
        else:
            yield ordinal, refined


def cut_into_chunks(
    files: Sequence[SourceFile], options: ReadOptions, chunk_bytes: int = CHUNK_BYTES, *, start: Position = BEGINNING
) -> Iterator[Chunk]:
    """Cut files into pieces of work of about `chunk_bytes`; a document is never cut, so a piece can be larger.

    Args:
        files: the whole input.
        options: names the column of Parquet files.
        chunk_bytes: of the files as they are once decompressed.
        start: of some chunk of this very input: cutting goes on with it, and the same chunks follow.
    """
    return cut(files, records_cutter(options, chunk_bytes), chunk_bytes, start)


def told(skipped: Mapping[str, int]) -> str:
    """Say what was skipped, as in ``2 bad lines, 1 binary files``."""
    return ", ".join(f"{count:,} {what}" for what, count in sorted(skipped.items()))


def records_cutter(
    options: ReadOptions, chunk_bytes: int
) -> Callable[[SourceFile, Position], Iterator[tuple[RecordsChunk, int]]]:
    """Return what cuts a file that is not text from a position in it on: chunks, and how many records each has."""

    def cut_file(file: SourceFile, start: Position) -> Iterator[tuple[RecordsChunk, int]]:
        if file.dataset is not None:
            return _cut_examples(file, file.dataset, start, options, chunk_bytes)
        if file.format == "jsonl":
            return _cut_lines(file, start, chunk_bytes)
        return _cut_rows(file, start, options, chunk_bytes)

    return cut_file


class HasStart(Protocol):
    """A chunk, or what stands for one."""

    @property
    def start(self) -> Position:
        """Where it begins."""


Piece = TypeVar("Piece", bound=HasStart)


def cut(
    files: Sequence[SourceFile],
    cut_records: Callable[[SourceFile, Position], Iterator[tuple[Piece, int]]],
    chunk_bytes: int,
    start: Position,
) -> Iterator[TextChunk | Piece]:
    """Gather text files until they make a chunk; cut other files by `cut_records`.

    That also says how many records there are from the beginning of a piece on; of the last piece of a file it matters.
    """
    here, waiting, waiting_bytes = start, list[SourceFile](), 0
    for index in range(start.file, len(files)):
        file = files[index]
        if waiting and (file.format != "text" or waiting_bytes + file.bytes > chunk_bytes):
            yield TextChunk(here, tuple(waiting))
            here, waiting, waiting_bytes = Position(index, ordinal=here.ordinal + len(waiting)), [], 0
        if file.format == "text":
            waiting.append(file)
            waiting_bytes += file.bytes
            continue
        ordinal = here.ordinal
        for piece, records in cut_records(file, here):
            yield piece
            ordinal = piece.start.ordinal + records
        here = Position(index + 1, ordinal=ordinal)
    if waiting:
        yield TextChunk(here, tuple(waiting))


def _cut_lines(file: SourceFile, start: Position, chunk_bytes: int) -> Iterator[tuple[LinesChunk, int]]:
    here = start
    with open_bytes(file.path, file.compression) as (stream, raw):
        _skip(stream, start.place, file)
        done = raw.tell()
        while read := _read_lines(stream, file, here.record, chunk_bytes):
            lines, size, data = read
            consumed = raw.tell() - done
            yield LinesChunk(here, file, consumed, data), lines
            here = here.after(lines, places=size)
            done += consumed


def _read_lines(stream: IO[bytes], file: SourceFile, record: int, wanted: int) -> tuple[int, int, bytes | None] | None:
    """Read so many bytes and on to the end of a line: how many lines, how many bytes, and these of a compressed file;
    None: there are no more. `record` is the number of the first.
    """
    if not (data := stream.read(wanted)):
        return None
    lines, size, parts = count_newlines(data), len(data), [data]
    if not data.endswith(b"\n"):
        lines += 1
        for part in _rest_of_line(stream, file, record + lines, size):
            size += len(part)
            if file.compression:
                parts.append(part)
    return lines, size, b"".join(parts) if file.compression else None


def _rest_of_line(stream: IO[bytes], file: SourceFile, number: int, begun: int) -> Iterator[bytes]:
    """Read up to the end of a line; `begun` bytes with the beginning of it, and maybe lines before it, are read."""
    while part := stream.readline(memory.LOOKED_AFTER):
        yield part
        if part.endswith(b"\n"):
            break
        begun += len(part)
        memory.require_room(f"{file.path}: line {number}", begun, "")


def _skip(stream: IO[bytes], count: int, file: SourceFile) -> None:
    """Go to a place in a file just opened; what is compressed has to be read up to there."""
    if not file.compression:
        stream.seek(count)
        return
    while count > 0 and (data := stream.read(min(count, 1 << 20))):
        count -= len(data)


def _cut_rows(
    file: SourceFile, start: Position, options: ReadOptions, chunk_bytes: int
) -> Iterator[tuple[RowsChunk | ExamplesChunk, int]]:
    """Whole row groups, which others read; but of one that is too large to be taken at once, its rows."""
    with open_parquet(file.path, options.text_field) as column:
        metadata = column.opened.metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        here, first = start, sum(group.num_rows for group in groups[: start.place])
        for number, group in enumerate(groups[start.place :], start.place):
            size, share = column.bytes_of(group), file.bytes // len(groups)
            if size <= LARGE_GROUP * chunk_bytes:
                yield RowsChunk(here, file, share), group.num_rows
            else:
                rows = column.rows(number, first, here.record - first)
                for texts, taken in _gathered(rows, chunk_bytes):
                    yield ExamplesChunk(here, file, texts, taken * share // size), len(texts)
                    here = here.after(len(texts), places=0)
            first += group.num_rows
            here = replace(here.after(first - here.record, places=0), place=number + 1)


def _cut_examples(
    file: SourceFile, dataset: DatasetShard, start: Position, options: ReadOptions, chunk_bytes: int
) -> Iterator[tuple[ExamplesChunk, int]]:
    here = start
    for texts, size in _gathered(dataset.rows(options.text_field, start.place), chunk_bytes):
        yield ExamplesChunk(here, file, texts, size), len(texts)
        here = here.after(len(texts), places=len(texts))


def _gathered(
    batches: Iterable[Sequence[bytes | None]], chunk_bytes: int
) -> Iterator[tuple[tuple[bytes | None, ...], int]]:
    """So many rows together that they have so many bytes or just more, and how many that are."""
    waiting, size = list[bytes | None](), 0
    for row in chain.from_iterable(batches):
        waiting.append(row)
        size += len(row or b"")
        if size >= chunk_bytes or len(waiting) >= MAX_ROWS:
            yield tuple(waiting), size
            waiting, size = [], 0
    if waiting:
        yield tuple(waiting), size


def _decoded(
    rows: Iterable[bytes | None], file: SourceFile, start: Position, options: ReadOptions, skipped: Skipped
) -> Iterator[tuple[int, str]]:
    for row, data in enumerate(rows):
        try:
            text = (data or b"").decode()
        except UnicodeDecodeError as error:
            place = f"{file.path}: row {start.record + row}"
            options.bad("rows", f"{place}: not UTF-8 at byte {error.start}", skipped)
            continue
        if text:
            yield start.ordinal + row, text
        else:
            skipped["empty documents"] += 1


def _read_text(file: SourceFile, options: ReadOptions, skipped: Skipped) -> str | None:
    """Return a file's text; None if it was skipped."""
    memory.require_room(str(file.path), file.bytes, ", or leave it out by --max-file-bytes")
    with open_bytes(file.path, file.compression) as (stream, _):
        data = _read_whole(stream, file) if file.compression else stream.read()
    if b"\0" in data[:BINARY_PROBE_BYTES]:
        if file.named:
            raise UserError(f"{file.path}: a binary file (NUL byte at offset {data.index(0)}), not UTF-8 text")
        skipped["binary files"] += 1
        return None
    try:
        # A byte order mark is a mark of the file, not a character of its text.
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        place = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        options.bad("files", f"{file.path}: not UTF-8 ({place})", skipped)
        return None


def _read_whole(stream: IO[bytes], file: SourceFile) -> bytes:
    """Read what no size tells of: a small file may be a large one that is compressed."""
    parts, size = list[bytes](), 0
    while part := stream.read(memory.LOOKED_AFTER):
        parts.append(part)
        size += len(part)
        memory.require_room(str(file.path), size, "")
    return b"".join(parts)
