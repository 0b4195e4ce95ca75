"""Tensor files back into the training state: each byte is read once, hashed on its way to where it belongs.

A file that this rank checks is read from start to end; of another, only what is wanted. What is wanted is copied out of
a small buffer, so a load costs no memory and hardly more time than the reading.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from llmtrain.checkpoint.direct_io import DirectFile, aligned_piece
from llmtrain.data.shards import Report
from llmtrain.errors import CorruptError

_GAP_BYTES = 1 << 20  # read over, for it costs less than to begin anew behind it
_MOST_HEADER_BYTES = 100_000_000  # as the safetensors library has it
_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wish:
    """The values of one saved fragment from `first` on, as many as `into` (1-D, on any device) has room for."""

    key: str  # in the file
    numel: int  # of the fragment
    first: int
    into: Tensor
    shape: tuple[int, ...] | None = None  # in the file; None: 1-D, as a checkpoint's fragments are


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    dtype: Literal["F32", "BF16", "F16", "F64", "I64"]
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Copy:
    """Bytes `begin` to `end` of the file belong here."""

    begin: int
    end: int
    into: Tensor  # uint8, 1-D


_HEADER = TypeAdapter(dict[str, _Entry | dict[str, str]])  # `__metadata__` has texts


def read_file(path: Path, wishes: Iterable[Wish], *, whole: bool, is_shared: bool, report: Report) -> str:
    """Fulfil the wishes from one safetensors file.

    Args:
        path: of the file.
        wishes: in any order.
        whole: read everything, also what nobody wishes for.
        is_shared: others on this machine read it too, so let it pass through the page cache.
        report: called before what was read is used; what it raises ends the reading.

    Returns:
        SHA-256 of the file, if it was read whole; else of what was read.

    Raises:
        CorruptError: the file is not what the wishes expect. Some of them may be fulfilled already.
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    piece = aligned_piece()
    buffer, memory = torch.from_numpy(piece), memoryview(piece)  # type: ignore[arg-type]
    with DirectFile(path, os.O_RDONLY, is_direct=whole and not is_shared) as file:
        size = os.fstat(file.descriptor).st_size
        converted: list[tuple[Tensor, Tensor]] = []
        copies = _copies(path, size, list(wishes), converted)
        first = 0
        for begin, end in [(0, None)] if whole else _spans(copies):
            if begin:
                os.lseek(file.descriptor, begin, os.SEEK_SET)
            at = begin
            while at != end and (count := file.read_into(memory[: end and end - at])):
                report(count)
                digest.update(memory[:count])
                while first < len(copies) and copies[first].end <= at:
                    first += 1
                _copy_out(copies, first, buffer, at, at + count)
                at += count
            if end is not None and at < end:
                raise CorruptError(f"{path}: ends at byte {at:,}, where it had {size:,} before")
        report(0)
        for values, into in converted:
            into.copy_(values)
    return digest.hexdigest()


def _copy_out(copies: Sequence[_Copy], first: int, buffer: Tensor, begin: int, end: int) -> None:
    """Give bytes `begin` to `end` of the file, which are in the buffer, to all whom they concern."""
    for index in range(first, len(copies)):
        copy = copies[index]
        if copy.begin >= end:
            break
        low, high = max(copy.begin, begin), min(copy.end, end)
        if low < high:
            copy.into[low - copy.begin : high - copy.begin].copy_(buffer[low - begin : high - begin])


def _copies(path: Path, size: int, wishes: Sequence[Wish], converted: list[tuple[Tensor, Tensor]]) -> list[_Copy]:
    """Where in the file the wishes lie, in its order; values of another type are read beside and `converted` later."""
    if not wishes:
        return []
    data, header = _header(path, size)
    copies = []
    for wish in wishes:
        entry = header.get(wish.key)
        if not isinstance(entry, _Entry):
            raise CorruptError(f"{path}: is not what its record says: it has no '{wish.key}'")
        dtype = _DTYPES[entry.dtype]
        begin, end = (data + offset for offset in entry.data_offsets)
        if (
            entry.shape != (wish.shape or (wish.numel,))
            or end - begin != wish.numel * dtype.itemsize
            or not data <= begin <= end <= size
        ):
            raise CorruptError(
                f"{path}: '{wish.key}' has shape {list(entry.shape)} at bytes {entry.data_offsets} of {entry.dtype}, "
                f"its record says {list(wish.shape or (wish.numel,))}"
            )
        into = wish.into
        if into.dtype != dtype:
            into = torch.empty(wish.into.shape, dtype=dtype)
            converted.append((into, wish.into))
        begin += wish.first * dtype.itemsize
        copies.append(_Copy(begin, begin + into.nbytes, into.view(torch.uint8)))
    return sorted(copies, key=lambda copy: copy.begin)


def read_header(path: Path, size: int) -> bytes:
    """The JSON header of a safetensors file of this size, as it stands there.

    Raises:
        CorruptError: its length cannot be right.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _MOST_HEADER_BYTES):
            raise CorruptError(f"{path}: cannot be read: its first 8 bytes say that its header has {length:,} bytes")
        return file.read(length)


def _header(path: Path, size: int) -> tuple[int, Mapping[str, _Entry | dict[str, str]]]:
    """Where the tensors' bytes begin, and what is where behind that."""
    header = read_header(path, size)
    try:
        return 8 + len(header), _HEADER.validate_json(header)
    except ValidationError as error:
        raise CorruptError(f"{path}: cannot be read: its header is wrong: {error.errors()[0]['msg']}") from error


def _spans(copies: Sequence[_Copy]) -> list[tuple[int, int | None]]:
    """What to read where not everything is: the copies' bytes, joined over small gaps."""
    spans: list[tuple[int, int]] = []
    for copy in copies:
        if spans and copy.begin - spans[-1][1] < _GAP_BYTES:
            spans[-1] = (spans[-1][0], max(copy.end, spans[-1][1]))
        else:
            spans.append((copy.begin, copy.end))
    return [(begin, end) for begin, end in spans]
