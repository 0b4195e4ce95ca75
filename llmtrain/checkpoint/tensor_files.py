"""Tensor fragments into safetensors files, several at a time, each hashed on its way to the disk."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmtrain.checkpoint.direct_io import DirectFile, aligned_piece
from llmtrain.data.shards import FileInfo
from llmtrain.engine import Fragment

FILE_BYTES = 512 << 20  # a file is closed once it has this many bytes of tensors
_THREADS = 4  # of each rank; one hashes 1 to 2 GB/s
_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip


def write_files(folder: Path, stem: str, fragments: Iterable[Fragment]) -> list[tuple[FileInfo, list[Fragment]]]:
    """Write fragments, in their order, to `STEM.safetensors`, `STEM-1.safetensors` …, flushed to disk.

    What lies on another device is copied to the host tensor by tensor.

    Returns:
        Each file's size and hash, and the fragments in it; at least one file.
    """
    parts = _split(fragments)
    names = [f"{stem}-{number}.safetensors" if number else f"{stem}.safetensors" for number in range(len(parts))]
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        infos = list(pool.map(lambda name, part: _write_one(folder / name, part), names, parts))
    return list(zip(infos, parts, strict=True))


def _split(fragments: Iterable[Fragment]) -> list[list[Fragment]]:
    parts: list[list[Fragment]] = [[]]
    size = 0
    for fragment in fragments:
        if size >= FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(fragment)
        size += fragment.values.nbytes
    return parts


def _write_one(path: Path, fragments: Sequence[Fragment]) -> FileInfo:
    specs = [TensorSpec(f"{f.name}@{f.start}", f.values.dtype, tuple(f.values.shape)) for f in fragments]
    return write_tensors(path, specs, (fragment.values for fragment in fragments))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a file says of one tensor."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> FileInfo:
    """Write a safetensors file: 8 bytes with the header's length, a JSON header, the tensors' bytes.

    The tensors, on any device, are taken one at a time, so they need not be in memory together.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        header[spec.key] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with _HashedFile(path) as file:
        file.write(np.frombuffer(len(encoded).to_bytes(8, "little") + encoded, np.uint8))
        for spec, tensor in zip(specs, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec.key
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return file.finish()


class _HashedFile:
    """A new file written from start to end in large aligned pieces."""

    def __init__(self, path: Path):
        self._path = path
        self._file = DirectFile(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._piece = aligned_piece()
        self._filled = self._bytes = 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self._file.__exit__(*failure)

    def write(self, data: npt.NDArray[np.uint8]) -> None:
        done = 0
        while done < len(data):
            take = min(len(data) - done, len(self._piece) - self._filled)
            self._piece[self._filled : self._filled + take] = data[done : done + take]
            self._filled += take
            done += take
            if self._filled == len(self._piece):
                self._write_piece()

    def finish(self) -> FileInfo:
        """Write what is left and wait until all is on the disk."""
        self._file.stop_direct()  # the rest is no whole number of blocks
        self._write_piece()
        os.fsync(self._file.descriptor)
        return FileInfo(path=self._path.name, bytes=self._bytes, sha256=self._digest.hexdigest())

    def _write_piece(self) -> None:
        filled = memoryview(self._piece)[: self._filled]  # type: ignore[arg-type]
        self._digest.update(filled)
        self._bytes += len(filled)
        self._filled = 0
        self._file.write(filled)
