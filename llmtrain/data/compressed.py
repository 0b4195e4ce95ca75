"""Files of text opened decompressed: plain, `.gz` and `.zst`, each read to an end that is its own or refused."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import zstandard

from llmtrain.data.memory import free_host_memory, told_of_memory
from llmtrain.errors import UserError

_HEADER_BYTES = 18  # of a frame at most, and more than those of a block
_SKIPPED_FRAMES = range(0x184D2A50, 0x184D2A60)  # by their first four bytes
_ONE_BYTE_REPEATED = 1  # the kind of such a block
_USUAL_WINDOW = 128 << 20  # what `zstd` takes unless told otherwise
_LARGEST_WINDOW = 1 << 31  # of `zstd --long=31`


@contextmanager
def open_bytes(path: Path, compression: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file decompressed; also give the file beneath, whose position tells how much of it is read.

    Raises:
        UserError: it cannot be read, is damaged, or is cut off, which shows no later than at its end.
    """
    try:
        with told_of_memory(path), path.open("rb") as raw:
            if compression == ".gz":
                yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)), raw
            elif compression == ".zst":
                decoder = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
                frames = cast(IO[bytes], _WholeFrames(path, raw))
                yield io.BufferedReader(decoder.stream_reader(frames, read_across_frames=True)), raw
            else:
                yield raw, raw
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(
            f"{path}: damaged or truncated {compression} file ({error}); fetch or make it again, or leave it out"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


class _WholeFrames:
    """Hands a .zst file on to its decoder, and raises EOFError if it ends within a frame.

    The decoder takes any end of the file for the end of the text, and what tells of the end of a frame
    (`decompressobj`) gives all text of its input at once, however much, and takes a fifth longer. So the headers of
    frames and blocks are followed (RFC 8878, 3.1); a block is up to 128 KiB of text, so they are few.
    """

    def __init__(self, path: Path, raw: IO[bytes]) -> None:
        self._path, self._raw = path, raw
        self._next = 0  # where the next header is
        self._is_in_frame = self._has_checksum = False

    def read(self, size: int) -> bytes:
        begin = self._raw.tell()
        data = self._raw.read(size)
        while self._next < begin + len(data):
            header = data[self._next - begin : self._next - begin + _HEADER_BYTES]
            if len(header) < _HEADER_BYTES:  # which may go on behind what was read
                header = os.pread(self._raw.fileno(), _HEADER_BYTES, self._next)
            self._follow(header)
        if not data and (self._is_in_frame or self._next > begin):
            raise EOFError("it ends within a frame")
        return data

    def _follow(self, header: bytes) -> None:
        if self._is_in_frame:
            block = int.from_bytes(header[:3], "little")
            is_last, kind, size = block & 1, block >> 1 & 3, block >> 3
            self._next += 3 + (1 if kind == _ONE_BYTE_REPEATED else size)
            if is_last:
                self._next += 4 * self._has_checksum
                self._is_in_frame = False
        elif int.from_bytes(header[:4], "little") in _SKIPPED_FRAMES:
            self._next += 8 + int.from_bytes(header[4:8], "little")
        else:
            frame = zstandard.get_frame_parameters(header)
            _require_window(self._path, min(frame.window_size, frame.content_size))
            self._next += zstandard.frame_header_size(header)
            self._is_in_frame, self._has_checksum = True, frame.has_checksum


def _require_window(path: Path, window: int) -> None:
    """Refuse a frame for which so much of its text has to be kept, if there is no memory for it."""
    if window > _USUAL_WINDOW and window > (free := free_host_memory()):
        raise UserError(
            f"{path}: its window is of {window / 1e9:.3g} GB (zstd --long), which does not fit into memory "
            f"({free / 1e9:.3g} GB are free); pack it again without --long"
        )
